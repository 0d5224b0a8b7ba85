"""How a sentence-transformers directory makes one vector of a text: modules.json, step by step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlx.core.errors import CheckpointError, ConfigError
from vlx.encoders.checkpoint import read_weights
from vlx.ops.text import mean_tokens

# In the order in which sentence-transformers puts several side by side.
_MODES = ("cls", "max", "mean")
_IGNORED = ("Normalize",)  # features are scaled to unit length where they are compared
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "Tanh": nn.Tanh,
    "Identity": nn.Identity,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "Sigmoid": nn.Sigmoid,
}


class Pooling(nn.Module):
    """Token vectors to one vector a text: class token, maximum and mean, then dense layers."""

    def __init__(self, modes: tuple[str, ...] = ("cls",), dense: tuple[Dense, ...] = ()) -> None:
        super().__init__()
        self.modes = modes
        self.dense = nn.Sequential(*dense)

    def dim(self, tokens: int) -> int:
        """Width of what comes out of tokens of a width."""
        last = self.dense[-1] if len(self.dense) else None
        return last.linear.out_features if isinstance(last, Dense) else tokens * len(self.modes)

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        """tokens: (B, L, D), real: (B, L) bool. Returns (B, `dim(D)`)."""
        found = {
            "cls": lambda: tokens[:, 0],
            "max": lambda: tokens.masked_fill(~real[..., None], float("-inf")).amax(1),
            "mean": lambda: mean_tokens(tokens, real),
        }
        return self.dense(torch.cat([found[mode]() for mode in self.modes], dim=-1))


class Dense(nn.Module):
    """A linear layer and its activation, as sentence-transformers saves them."""

    def __init__(self, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.activation = linear, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


@dataclass(frozen=True)
class SentenceLayout:
    """What modules.json of a directory lists."""

    transformer: Path
    """Where config, weights and tokenizer of the transformer are."""
    after: tuple[tuple[str, Path], ...]
    """(kind, folder) of the steps after it."""


def sentence_layout(folder: Path) -> SentenceLayout:
    """Of any model directory; one without modules.json is the transformer's own."""
    file = folder / "modules.json"
    if not file.is_file():
        return SentenceLayout(folder, ())
    steps = [(str(step["type"]).rsplit(".", 1)[-1], folder / step["path"]) for step in _json(file)]
    if not steps or steps[0][0] != "Transformer":
        kind = steps[0][0] if steps else "nothing"
        raise ConfigError(f"{file} starts with {kind}, not with a Transformer")
    return SentenceLayout(steps[0][1], tuple(steps[1:]))


def pooling_of(layout: SentenceLayout) -> Pooling:
    """The steps after the transformer; without any, the class token. Raises `ConfigError` for a
    step that is not known here."""
    modes: tuple[str, ...] = ("cls",)
    dense: list[Dense] = []
    for kind, folder in layout.after:
        if kind == "Pooling":
            modes = _modes(folder / "config.json")
        elif kind == "Dense":
            dense.append(_dense(folder))
        elif kind not in _IGNORED:
            raise ConfigError(
                f"{folder.parent}/modules.json has a {kind}; known: Pooling, Dense, Normalize"
            )
    return Pooling(modes, tuple(dense))


def _modes(file: Path) -> tuple[str, ...]:
    config = _json(file)
    # Either a flag for every mode (`pooling_mode_mean_tokens`) or, newer, names.
    chosen = config.get("pooling_mode", [])
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    flags = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    names += [key.removeprefix("pooling_mode_").removesuffix("_tokens") for key in flags]
    names = ["cls" if name == "cls_token" else name for name in names]
    unknown = sorted(set(names) - set(_MODES))
    if unknown or not names:
        raise ConfigError(
            f"{file} asks for {', '.join(unknown) or 'no pooling'}; known: cls, max, mean"
        )
    return tuple(mode for mode in _MODES if mode in names)


def _dense(folder: Path) -> Dense:
    config = _json(folder / "config.json")
    linear = nn.Linear(config["in_features"], config["out_features"], config.get("bias", True))
    name = str(config.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    if name not in _ACTIVATIONS:
        raise ConfigError(f"{folder} has the activation {name}; known: {', '.join(_ACTIVATIONS)}")
    if torch.get_default_device().type != "meta":  # there, nothing has weights
        files = [folder / "model.safetensors", folder / "pytorch_model.bin"]
        state = read_weights(next((file for file in files if file.is_file()), files[0]))
        own = {key.removeprefix("linear."): value for key, value in state.items()}
        try:
            linear.load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointError(f"{folder} does not fit its own config.json") from error
    return Dense(linear, _ACTIVATIONS[name]())


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {str(error).splitlines()[0]}") from error
