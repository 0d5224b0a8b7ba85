"""Backbones in stages under timm's conventions: a paper brings its stages and its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vlx.blocks.timm_model import TimmNetwork, build_model
from vlx.core.errors import ConfigError
from vlx.ops.tokens import map_to_tokens


class Pyramid(TimmNetwork):
    """What timm, and with it `TimmBackbone`, asks of a model; B batch, C width of a stage.

    A stage maps (B, C', h', w') to its own map (B, C, h, w) and, where it has one, a class token
    (B, 1, C). Subclasses fill `stages` and `head` (the last linear layer), call `describe`, and
    give `finish` and `forward_head`.
    """

    layers_name = "stages"
    stages: nn.ModuleList
    num_prefix_tokens = 0

    def describe(
        self, dims: Sequence[int], strides: Sequence[int], *, num_classes: int, hidden: int
    ) -> None:
        """Set timm's attributes; `hidden` is the width that the last linear layer takes."""
        self.num_classes = num_classes
        self.num_features = dims[-1]
        self.head_hidden_size = hidden
        self.global_pool = self.pools[0]
        self.feature_info: list[dict[str, Any]] = []
        reduction = 1
        for number, (dim, stride) in enumerate(zip(dims, strides, strict=True)):
            reduction *= stride
            info = {"num_chs": dim, "reduction": reduction, "module": f"stages.{number}"}
            self.feature_info.append(info)

    def finish(self, x: Tensor, cls_token: Tensor | None) -> Tensor:
        """The last stage's outputs to what `forward_features` returns."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W), normalised."""
        cls_token = None
        for stage in self.stages:
            x, cls_token = stage(x)
        return self.finish(x, cls_token)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stages' maps, as timm's models give them; `norm` is of no stage but `finish`."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt={output_fmt}: a pyramid gives NCHW or NLC")
        taken, last = feature_take_indices(len(self.stages), indices)
        cls_token, maps = None, []
        for number, stage in enumerate(self.stages):
            if stop_early and number > last:
                break
            x, cls_token = stage(x)
            if number in taken:
                maps.append(x if output_fmt == "NCHW" else map_to_tokens(x))
        return maps if intermediates_only else (self.finish(x, cls_token), maps)


def check_stages(model: str, **by_stage: Sequence[object]) -> None:
    """Raise `ConfigError` unless all these lists have one entry a stage."""
    counts = {name: len(values) for name, values in by_stage.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ConfigError(f"{model} needs as many of each as it has stages, got {found}")


def build_pyramid(cls: type[Pyramid], name: str, pretrained: bool, **arguments: Any) -> Any:
    """An entry of timm's registry: the model, or the maps of all its stages."""
    features = tuple(range(len(arguments["embed_dims"])))
    return build_model(cls, name, pretrained, features=features, **arguments)
