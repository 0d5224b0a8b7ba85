"""Builds the encoders that a recipe chose."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vlx.core.errors import ConfigError
from vlx.core.text import Tokenizer
from vlx.encoders.base import VisionEncoder
from vlx.encoders.checkpoint import load_encoder
from vlx.encoders.config import EncoderConfig, PosEmbed, TextConfig
from vlx.encoders.conv_mae import ConvMae, is_conv_mae
from vlx.encoders.published import load_published
from vlx.encoders.text import TextEncoder
from vlx.encoders.timm_backbone import TimmBackbone
from vlx.encoders.timm_vit import TimmVit, is_plain_vit

if TYPE_CHECKING:
    from vlx.encoders.language_model import LanguageModel

log = logging.getLogger("vlx")
_NO_TEXT = "the method reads text and the run has none: choose it by text=clip"


class EncoderBuilder:
    """Implements `core.method.Builder` from configs by role ("encoder", "teacher")."""

    def __init__(
        self,
        roles: Mapping[str, EncoderConfig | None],
        num_classes: int,
        load_weights: bool = True,
        *,
        text: TextConfig | None = None,
        tokenizer: Tokenizer | None = None,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.roles = dict(roles)
        self.num_classes = num_classes
        self._class_names, self._warned = class_names, False
        self.load_weights = load_weights
        self._text, self._tokenizer = text, tokenizer

    @property
    def image_size(self) -> int:
        encoder = self.roles["encoder"]
        assert encoder is not None
        return encoder.image_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the data, as words; empty where they are not known."""
        if (
            self.load_weights
            and self._class_names
            and not self._warned
            and all(n.isdigit() for n in self._class_names)
        ):
            self._warned = True
            log.warning(
                f"the method reads class names, and these are numbers: "
                f"{', '.join(self._class_names[:3])}. data.class_names=FILE names the classes"
            )
        return self._class_names

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the run's text. Raises `ConfigError` where the run has none."""
        if self._tokenizer is None:
            raise ConfigError(_NO_TEXT)
        return self._tokenizer

    def text(self, *, frozen: bool = False, **architecture: Any) -> TextEncoder:
        """The text encoder that `text` names, with its weights where it names some.

        frozen: the method never trains it, so that random weights are worth a warning.
        """
        from vlx.encoders.text_build import build_text_encoder

        encoder = build_text_encoder(self._text_config(frozen), self.tokenizer, **architecture)
        self._load_text(encoder)
        return encoder

    def language_model(self, *, frozen: bool = False) -> LanguageModel:
        """The language model that `text` names, with its weights where it names some."""
        from vlx.encoders.text_build import build_language_model

        model = build_language_model(self._text_config(frozen), self.tokenizer)
        self._load_text(model)
        return model

    def _text_config(self, frozen: bool) -> TextConfig:
        if self._text is None:
            raise ConfigError(_NO_TEXT)
        local = Path(self._text.name).expanduser().is_dir()
        if frozen and self.load_weights and not (local or self._text.checkpoint):
            log.warning(
                f"the text side ({self._text.name}) stays frozen with random weights: set "
                "text.name=DIRECTORY of Hugging Face, or text.checkpoint=RUN"
            )
        return self._text

    def _load_text(self, model: nn.Module) -> None:
        if self.load_weights and self._text is not None and self._text.checkpoint:
            load_encoder(model, self._text.checkpoint, tokenizer=self.tokenizer)

    def vision(
        self,
        role: str = "encoder",
        *,
        init: Callable[[VisionEncoder], None] | None = None,
        num_classes: int = 0,
        head_bias: bool = True,
        arguments: Mapping[str, Any] | None = None,
        frozen: bool | None = None,
        **architecture: Any,
    ) -> VisionEncoder:
        """The encoder of a role; keywords (`pos_embed="sincos"`) fix what the paper fixes.

        num_classes: with a head for so many classes, for `classify`; 0 for none. head_bias: False
        for a projection (`VisionEncoder.drop_head_bias`). arguments: for the model's own
        constructor, where it is not a plain ViT. frozen: the method never trains it and loads no
        weights itself, so that random ones are worth a warning; None: so is every role but
        "encoder".

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
        if not head_bias:
            encoder.drop_head_bias()
        if init is not None:
            init(encoder)
        untrained = role != "encoder" if frozen is None else frozen
        if self.load_weights and untrained and not (cfg.pretrained or cfg.checkpoint):
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
