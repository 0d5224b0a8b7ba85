"""Builds the encoders that a recipe chose."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vlx.core.errors import ConfigError
from vlx.encoders.base import VisionEncoder
from vlx.encoders.checkpoint import load_encoder
from vlx.encoders.config import EncoderConfig, PosEmbed
from vlx.encoders.conv_mae import ConvMae, is_conv_mae
from vlx.encoders.timm_backbone import TimmBackbone
from vlx.encoders.timm_vit import TimmVit, is_plain_vit, load_published

log = logging.getLogger("vlx")


class EncoderBuilder:
    """Implements `core.method.Builder` from configs by role ("encoder", "teacher")."""

    def __init__(
        self, roles: Mapping[str, EncoderConfig | None], num_classes: int, load_weights: bool = True
    ) -> None:
        self.roles = dict(roles)
        self.num_classes = num_classes
        self.load_weights = load_weights

    @property
    def image_size(self) -> int:
        encoder = self.roles["encoder"]
        assert encoder is not None
        return encoder.image_size

    def vision(
        self,
        role: str = "encoder",
        *,
        init: Callable[[VisionEncoder], None] | None = None,
        num_classes: int = 0,
        arguments: Mapping[str, Any] | None = None,
        **architecture: Any,
    ) -> VisionEncoder:
        """The encoder of a role; keywords (`pos_embed="sincos"`) fix what the paper fixes.

        num_classes: with a head for so many classes, for `classify`; 0 for none. arguments: for
        the model's own constructor, where it is not a plain ViT.

        init: the paper's initialisation, applied before any published or saved weights are loaded.
        """
        cfg = self.roles.get(role)
        if cfg is None:
            raise ConfigError(
                f"the method needs an encoder as '{role}': set {role}.name (a timm ViT)"
            )
        if "pos_embed" in architecture:
            architecture["pos_embed"] = PosEmbed(architecture["pos_embed"])
        cfg = replace(cfg, **architecture)
        if num_classes and is_conv_mae(cfg.name):
            raise ConfigError(f"{role}.name={cfg.name} has no classifier; use a timm ViT")
        encoder = build_encoder(cfg, num_classes, arguments or {})
        if init is not None:
            init(encoder)
        if self.load_weights and role != "encoder" and not (cfg.pretrained or cfg.checkpoint):
            log.warning(
                f"the {role} has random weights and teaches nothing: set {role}.checkpoint=RUN, or "
                f"{role}.pretrained=true for timm's published weights"
            )
        if self.load_weights and cfg.pretrained:
            load_published(encoder, cfg)
        if self.load_weights and cfg.checkpoint:
            prefix = encoder.spec.num_prefix
            load_encoder(encoder.backbone, cfg.checkpoint, grid=encoder.spec.grid, prefix=prefix)
        return encoder


def build_encoder(
    cfg: EncoderConfig, num_classes: int, arguments: Mapping[str, Any]
) -> VisionEncoder:
    """The kind of encoder that a name asks for: ConvMAE's, a plain ViT, any other model of timm."""
    if is_conv_mae(cfg.name):
        return ConvMae(cfg)
    if is_plain_vit(cfg.name):
        return TimmVit(cfg, num_classes)
    return TimmBackbone(cfg, num_classes, **arguments)
