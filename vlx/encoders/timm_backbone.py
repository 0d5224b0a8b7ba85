"""Any model of timm's registry as a `VisionEncoder`: what is not a plain ViT."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vlx.blocks.vit_block import BlockHook
from vlx.core import registry
from vlx.core.errors import ConfigError, nearest, one_line
from vlx.encoders.base import EncoderOut, EncoderSpec, VisionEncoder
from vlx.encoders.config import EncoderConfig
from vlx.encoders.names import model_names
from vlx.ops.tokens import map_to_tokens


def register_backbones(name: str) -> None:
    """Import the method whose paper registers the model `name` with timm, where there is one."""
    for paper in registry.papers().values():
        if name in paper.backbones:
            registry.load(paper.slug)


class TimmBackbone(VisionEncoder):
    """`model` is timm's module; tokens are the positions of its last feature map, row-major.

    num_classes: 0 leaves out the head. arguments: passed on to the model as they are; of the
    config's sizes only those that are set.
    """

    def __init__(self, cfg: EncoderConfig, num_classes: int = 0, **arguments: Any) -> None:
        super().__init__()
        self.arguments = {"num_classes": num_classes, **arguments}
        self.model = _create(cfg, **self.arguments)
        shape = _last_map(cfg, self.arguments)
        self.dim = int(self.model.num_features)  # type: ignore[arg-type]
        count = _as_tokens(shape, self.dim).shape[1]
        side = math.isqrt(count)
        # Of a square image the patches are a square; some models do not say what else is there.
        rest = count - side**2
        self.num_prefix = int(getattr(self.model, "num_prefix_tokens", rest))
        side = math.isqrt(count - self.num_prefix)
        self.spec = EncoderSpec(
            dim=self.dim,
            depth=0,
            heads=0,
            patch_size=max(1, cfg.image_size // max(1, side)),
            image_size=cfg.image_size,
            num_prefix=self.num_prefix,
            class_token=_class_tokens(self.model) > 0 or rest > 0,
            mean=tuple(cfg.mean),
            std=tuple(cfg.std),
            side=side,
        )
        self.set_statistics(cfg.mean, cfg.std)

    @property
    def backbone(self) -> nn.Module:
        return self.model

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        layers: Sequence[int] = (),
        normalised: bool = False,
        hook: BlockHook | None = None,
    ) -> EncoderOut:
        if keep is not None or hook is not None:
            raise ConfigError(
                f"{type(self.model).__name__} takes whole images only: masking and token reduction "
                "need a plain ViT, e.g. encoder.name=deit_small_patch16_224"
            )
        x = images if normalised else self.normalise(images)
        if layers:
            return self._tapped(x, layers)
        features = self.model.forward_features(x)  # type: ignore[operator]
        tokens = _as_tokens(features, self.dim)
        count = self.num_prefix
        return EncoderOut(tokens[:, count:], tokens[:, :count], features=features)

    def _tapped(self, x: Tensor, layers: Sequence[int]) -> EncoderOut:
        """timm's own intermediate maps, a stage a layer."""
        indices = [layer - 1 for layer in layers]
        features, maps = self.model.forward_intermediates(x, indices=indices)  # type: ignore[operator]
        tokens, count = _as_tokens(features, self.dim), self.num_prefix
        taps = {layer: map_to_tokens(found) for layer, found in zip(layers, maps, strict=True)}
        return EncoderOut(tokens[:, count:], tokens[:, :count], taps, features=features)

    def published(self, cfg: EncoderConfig) -> nn.Module:
        return _create(cfg, **self.arguments, pretrained=True)

    def layer_dims(self) -> list[int]:
        """Of timm's stages. Raises `ConfigError` for a model whose stages timm does not tap."""
        if not hasattr(self.model, "forward_intermediates"):
            raise ConfigError(f"{type(self.model).__name__} gives no stages: use another encoder")
        return [int(stage["num_chs"]) for stage in self.model.feature_info]  # type: ignore

    def classify(self, out: EncoderOut) -> Tensor:
        return _head(self.model, out.features)


def _head(model: nn.Module, features: Any) -> Tensor:
    """timm's pooling and head. Raises `ConfigError` for a model that has none."""
    try:
        return model.forward_head(features)  # type: ignore[operator]
    except NotImplementedError as error:
        raise ConfigError(
            f"{type(model).__name__} classifies nothing: {one_line(error)}"
        ) from error


def _class_tokens(model: nn.Module) -> int:
    tokens = getattr(model, "cls_token", None)
    return tokens.shape[-2] if isinstance(tokens, Tensor) else 0


def _as_tokens(features: Tensor, dim: int) -> Tensor:
    """(B, D, h, w), (B, h, w, D) or (B, N, D) as (B, N, D)."""
    if features.ndim == 3:
        return features
    if features.ndim == 4 and features.shape[1] == dim:
        return features.flatten(2).transpose(1, 2)
    return features.flatten(1, 2)


def _last_map(cfg: EncoderConfig, arguments: dict[str, Any]) -> Tensor:
    """What the model's `forward_features` makes of one image: its shape alone, on "meta".

    Raises `ConfigError` for a model that cannot classify, or whose features are several maps.
    """
    side = cfg.image_size
    with torch.device("meta"), torch.no_grad():
        model = _create(cfg, **arguments).eval()
        try:
            features = model.forward_features(torch.empty(1, 3, side, side))  # type: ignore[operator]
            if arguments["num_classes"]:
                _head(model, features)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"encoder.name={cfg.name} does not take encoder.image_size={side}: "
                f"{one_line(error)}"
            ) from error
    alone = isinstance(features, Tensor) and features.shape[1] == _class_tokens(model)
    if not isinstance(features, Tensor) or features.ndim not in (3, 4) or alone:
        kind = "several maps" if isinstance(features, list | tuple) else "no map of patches"
        raise ConfigError(
            f"encoder.name={cfg.name} is a {type(model).__name__}, which gives {kind}, and an "
            "encoder gives one. Use e.g. encoder.name=resnet50 or vit_small_patch16_224"
        )
    return features


_OPTIONAL = re.compile(r"unexpected keyword argument.*'(img_size|drop_path_rate)'")


def _create(cfg: EncoderConfig, **arguments: Any) -> nn.Module:
    register_backbones(cfg.name)
    if not timm.is_model(cfg.name):
        raise ConfigError(
            f"encoder.name: no timm model '{cfg.name}'. {nearest(cfg.name, model_names())}"
        )
    sizes: dict[str, Any] = {
        "patch_size": cfg.patch_size,
        "embed_dim": cfg.dim,
        "depth": cfg.depth,
        "num_heads": cfg.heads,
    }
    given = {key: value for key, value in sizes.items() if value is not None} | arguments
    # Only some models are built for one image size or have stochastic depth, and these take it.
    optional = {"img_size": cfg.image_size, "drop_path_rate": cfg.drop_path}
    while True:
        try:
            return timm.create_model(cfg.name, **optional, **given)
        except (TypeError, AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
            unknown = _OPTIONAL.search(str(error))
            if unknown is None:
                raise ConfigError(
                    f"encoder.name={cfg.name} does not take {given}: {one_line(error)}"
                ) from error
            if optional.pop(unknown[1]) and unknown[1] == "drop_path_rate":
                raise ConfigError(
                    f"encoder.drop_path={cfg.drop_path}: {cfg.name} has no stochastic depth"
                ) from error
