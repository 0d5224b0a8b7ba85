"""Encoder weights from vlx runs, official files and timm files, with a strict report."""

from __future__ import annotations

import logging
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlx.core.errors import CheckpointError, one_line
from vlx.core.files import parse_json
from vlx.core.manifest import MANIFEST_FILE, MODEL_FILE, STATE_FILE, WEIGHTS, check, newest
from vlx.core.released import Released
from vlx.core.text import Tokenizer
from vlx.encoders.archives import Hollow, read_archive, tensors_of
from vlx.encoders.frozen_towers import digest_of, read_model
from vlx.encoders.released_vit import vit_names

log = logging.getLogger("vlx")
ADAPTER_FILE = "adapter.safetensors"
"""In the directory of a run with a frozen base: what it trained."""
DIGEST_KEY = "tensors_sha256"
"""In a safetensors file's metadata: `digest_of` its tensors, of a file that no manifest names."""

POOLED = "head.pos_embed"
"""Position table of the attention pooling of CLIP's ResNets: one row for the mean, one a place."""

TOKEN_TABLES = ("tokens.weight", "word_embeddings.weight", "embed_tokens.weight", "wte.weight")
"""How the token tables of CLIP, BERT, Llama and GPT end."""

# Keys of published files that are not the encoder's: decoders, heads, momentum copies.
_NOT_ENCODER = ("decoder", "mask_token", "head.", "fc_norm.", "mimic", "teacher.", "momentum")
_WANTED = "no state dict (a mapping of names to tensors)"
_PREFIXES = (
    "encoder.vit.", "encoder.model.", "image.vit.", "image.model.", "vit.", "module.", "backbone.",
    "encoder.", "towers.image.vit.", "towers.image.model.", "towers.text.", "text.",
    "language_model.",
    # In `blocks.frozen.Frozen`:
    "encoder.module.vit.", "encoder.module.model.", "towers.image.module.vit.",
    "towers.image.module.model.", "language_model.module.",
)  # fmt: skip


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file or a vlx run directory; nothing that a pickle names is run.

    Of a run that kept a moving average, the averaged weights: those that its results are of.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = _weights_of_run(file)
        averaged = file.with_name("ema.safetensors")
        if averaged.is_file():
            return read_model(file.parent) | load_file(averaged)
    elif all((file.parent / name).is_file() for name in (MANIFEST_FILE, STATE_FILE)):
        check(file.parent, only={STATE_FILE, file.name})  # a file of a checkpoint of ours
    if not file.is_file():
        raise CheckpointError(
            f"no checkpoint at {path}: give a run directory, .safetensors or .pth"
        )
    state = read_model(file.parent) if file.name == MODEL_FILE else _read(file)
    for key in ("model", "state_dict", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    held = state
    if isinstance(state, Hollow):  # a script's module
        state = tensors_of(state)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"cannot read {file}: it holds {_what(held)}, {_WANTED}")
    if not state:
        raise CheckpointError(f"cannot read {file}: it holds {_what(held)} and no tensor")
    return state


def _what(held: Any) -> str:
    """In words, what a file holds: of a mapping, what is first in it and is no tensor."""
    if isinstance(held, dict):
        others = {name: value for name, value in held.items() if not isinstance(value, Tensor)}
        inside = [f"{_what(value)} as {name!r}" for name, value in others.items()]
        return f"a mapping with {inside[0]}" if inside else "a mapping"
    return held.named if isinstance(held, Hollow) else f"a {type(held).__name__}"


def _read(file: Path) -> Any:
    """What a file holds; nothing that a pickle names is run.

    Raises `CheckpointError` with what the file holds, and how to save its tensors alone.
    """
    try:
        if file.suffix == ".safetensors":
            return read_safetensors(file)[0]
        if zipfile.is_zipfile(file):
            return read_archive(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        named = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if not named:
            raise CheckpointError(f"cannot read {file}: torch did not write it") from error
        raise CheckpointError(
            f"{file} is a pickle of an old kind that holds {named[0]} beside tensors, and is not "
            "run: where it was made, save the tensors alone, "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error
    except Exception as error:
        raise CheckpointError(f"cannot read {file}: {one_line(error)}") from error


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file.

    Raises `CheckpointError` where the metadata has the digest of other tensors (`DIGEST_KEY`).
    """
    with safe_open(file, "pt") as opened:
        meta = opened.metadata() or {}
    tensors = load_file(file)
    if meta.get(DIGEST_KEY, found := digest_of(tensors)) != found:
        raise CheckpointError(f"{file} is damaged: its tensors are not those that were saved")
    return tensors, meta


def read_best(run: Path) -> dict[str, Tensor] | None:
    """The weights of a run directory that were best by `train.keep_best`; None where it kept none.

    As they were evaluated: those of a moving average where the run has one, but not the average of
    `train.swad`, which is evaluated at the end alone.
    """
    last = newest(run / "checkpoints", only=WEIGHTS)
    if last is None:
        return None
    try:
        state = parse_json((last / STATE_FILE).read_text(encoding="utf-8"))
        name = state.get("progress", {}).get("best_checkpoint")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{last / STATE_FILE} cannot be read: {error}") from error
    if name is None:
        return None
    if not re.fullmatch(r"step-\d+", str(name)):
        raise CheckpointError(f"{last / STATE_FILE}: {name!r} is no checkpoint of the run")
    folder = run / "checkpoints" / name
    check(folder, only=WEIGHTS)
    model, averaged = read_model(folder), folder / "ema.safetensors"
    if averaged.is_file() and not (folder / "swad.safetensors").is_file():
        model |= load_file(averaged)
    return model


def _weights_of_run(run: Path) -> Path:
    """The weights of a checkpoint directory, or of a run's newest checkpoint: those saved.

    Raises `CheckpointError` for damaged ones. A directory without a manifest and a state is no
    checkpoint of ours, and cannot be compared.
    """
    if (run / MODEL_FILE).is_file():
        if (run / MANIFEST_FILE).is_file() or (run / STATE_FILE).is_file():
            check(run, only=WEIGHTS)
        return run / MODEL_FILE
    last = newest(run / "checkpoints", only=WEIGHTS)
    if last is None:
        raise CheckpointError(f"{run} holds no checkpoint (checkpoints/step-*/{MODEL_FILE})")
    return last / MODEL_FILE


def encoder_state(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """The entries of `state` under the encoder's own `names`, whatever prefix they carry."""
    best: dict[str, Tensor] = {}
    for prefix in ("", *_PREFIXES, "module.encoder.", "encoder.encoder."):
        found = {
            key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)
        }
        # Two towers both have `blocks.0`: the one that shares more names is meant.
        if len(names & found.keys()) > len(names & best.keys()):
            best = found
    return {
        key: value
        for key, value in best.items()
        if key in names or not key.startswith(_NOT_ENCODER)
    }


def load_encoder(
    encoder: nn.Module,
    path: str | Path,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int = 0,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Load `path` into a backbone, strictly; a mismatch loads nothing and names the keys.

    grid, prefix: the backbone's patches (rows, columns) and its class and register tokens. With
    them a square position table of another image size is resampled (bicubic) to the grid.
    tokenizer: whose ids the token table of a text encoder is for.
    """
    own = encoder.state_dict()
    released = read_weights(path)
    if isinstance(encoder, Released):
        released = encoder.own_names(released)
    elif isinstance(encoder, VisionTransformer):
        released = vit_names(released)
    state = encoder_state(released, set(own))
    if grid is not None:
        fit_positions(own, state, grid, prefix)
        fit_positions(own, state, grid, prefix, POOLED)
    if tokenizer is not None:
        table = next((key for key in own if key.endswith(TOKEN_TABLES)), "")
        if table:
            check_rows(tokenizer, own[table], state.get(table), path)
    for classifier in _classifiers(encoder):
        _fit_head(own, state, classifier, path)
    load_whole(encoder, state, path)


def check_rows(tokenizer: Tokenizer, own: Tensor, saved: Tensor | None, path: str | Path) -> None:
    """Raise `CheckpointError` where a saved token table `(V, D)` has other rows than one's own."""
    if saved is None or len(saved) == len(own):
        return
    raise CheckpointError(
        f"{path} has a token table of {len(saved):,} ids, and text.tokenizer ({tokenizer.name}) "
        f"makes one of {len(own):,}: set text.tokenizer to the one that it was trained with, "
        "and text.vocab_size to its ids"
    )


def load_whole(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load every tensor of a module, or nothing, naming the keys that do not fit."""
    own = module.state_dict()
    # Older files lack torch's counter of batches, which no batch norm with a momentum reads.
    state = {k: v for k, v in own.items() if k.endswith(".num_batches_tracked")} | state
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    reshaped = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    if missing or unexpected or reshaped:
        parts = (("missing", missing), ("unexpected", unexpected), ("reshaped", reshaped))
        report = "; ".join(f"{len(k)} {what}: {', '.join(k[:3])}" for what, k in parts if k)
        raise CheckpointError(
            f"{path} does not fit the encoder, nothing was loaded. {report}. Choose the model and "
            "the sizes that it was trained with (encoder=, text=)"
        )
    module.load_state_dict(state)


def _classifiers(encoder: nn.Module) -> tuple[str, ...]:
    """Names of the module or modules that timm calls a model's classifier."""
    named = getattr(encoder, "pretrained_cfg", {}).get("classifier") or "head"
    return (named,) if isinstance(named, str) else tuple(named)


def _fit_head(
    own: dict[str, Tensor], state: dict[str, Tensor], classifier: str, path: str | Path
) -> None:
    """Keep the model's own new head where the file has none, or one of other classes; leave out
    the file's where the model has none."""
    head, saved = (names.get(f"{classifier}.weight") for names in (own, state))
    if head is not None and saved is not None and len(saved) == len(head):
        return  # of another width, it does not fit
    if head is not None and saved is None:
        log.info(f"{path} has no classifier: the head is new")
    elif head is not None and saved is not None:
        log.warning(
            f"{path} classifies {len(saved)} classes and the data has {len(head)}: the head is new"
        )
    for kind in ("weight", "bias"):
        name = f"{classifier}.{kind}"
        state.pop(name, None)
        if name in own:
            state[name] = own[name]


def fit_positions(
    own: dict[str, Tensor],
    state: dict[str, Tensor],
    grid: tuple[int, int],
    prefix: int,
    key: str = "pos_embed",
) -> None:
    """Resample the position table `state[key]` to `grid` where only the number of places differs.

    prefix: class and register tokens, whose rows stay as they are; so does the row of the mean in
    `POOLED`, a table without the first axis.
    """
    table, wanted = state.get(key), own.get(key)
    if table is None or wanted is None or table.ndim != wanted.ndim:
        return
    pooled = key.endswith(POOLED)
    if table.ndim != (2 if pooled else 3) or table.shape[-1] != wanted.shape[-1]:
        return
    rows = wanted.shape[-2] - grid[0] * grid[1]  # table rows that belong to prefix tokens
    count = table.shape[-2] - rows
    known = (1,) if pooled else (0, prefix)
    if table.shape == wanted.shape or rows not in known or math.isqrt(count) ** 2 != count:
        return
    old = math.isqrt(count)
    log.info(f"position table resampled from {old}x{old} to {grid[0]}x{grid[1]} patches")
    table = table.reshape(1, -1, table.shape[-1])
    resampled = resample_abs_pos_embed(table, list(grid), [old, old], rows)
    state[key] = resampled.reshape(wanted.shape)
