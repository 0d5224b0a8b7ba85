"""Papers whose method is a backbone of their own, trained on labels."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vlx.core.capability import Capability
from vlx.core.errors import ConfigError
from vlx.core.method import Builder
from vlx.encoders.base import EncoderFeatures, VisionEncoder
from vlx.families.classifier import Classifier, Logits
from vlx.families.configs.classifier import ClassifierConfig, StagesConfig


class BackboneClassifier(Classifier):
    """A classifier that is its encoder. Subclasses name the kinds of model that they train."""

    Backbone: ClassVar[type[nn.Module] | tuple[type[nn.Module], ...]]
    models: ClassVar[tuple[str, ...]]
    """Their names, for the message that refuses others."""

    def __init__(self, cfg: ClassifierConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.encoder: VisionEncoder = build.vision(
            num_classes=self.num_classes, arguments=self.encoder_arguments(cfg)
        )
        if not isinstance(self.encoder.backbone, self.Backbone):
            raise ConfigError(
                f"encoder.name is a {type(self.encoder.backbone).__name__}; this method trains "
                f"{', '.join(self.models)}. `vlx finetune supervised` trains any model"
            )

    def class_logits(self, images: Tensor) -> Tensor:
        return self.encoder.classify(self.encoder(images))

    def exports(self) -> tuple[Capability, ...]:
        return Logits(self), EncoderFeatures(self.encoder)


def stage_arguments(cfg: StagesConfig) -> dict[str, list[int]]:
    """The constructor's arguments that the config's sizes set; null keeps the model's own."""
    sizes = {
        "embed_dims": cfg.stage_dims,
        "depths": cfg.stage_depths,
        "num_heads": cfg.stage_heads,
        "strides": cfg.stage_strides,
    }
    return {name: list(value) for name, value in sizes.items() if value is not None}
