"""Classifiers whose backbone runs on few tokens by its own design; papers differ in it."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from vlx.core.capability import Capability
from vlx.core.errors import ConfigError
from vlx.core.method import Builder
from vlx.encoders.base import EncoderFeatures, VisionEncoder
from vlx.families.classifier import Classifier, Logits
from vlx.families.configs.classifier import ClassifierConfig
from vlx.families.token_reduction import AgainstReference


@runtime_checkable
class FewTokenBackbone(Protocol):
    """What such a backbone has beside timm's own conventions."""

    plain: str
    """timm's name of the plain model of its size, which it is measured against."""

    def token_counts(self) -> dict[str, list[int]]:
        """Tokens by layer, as `ReducedTokens` reports them."""
        ...

    def gatherers(self, images: Tensor) -> Tensor:
        """(B, P) int64: the token that gathers most from each patch, in the last layer that
        gathers. images: (B, 3, H, W), normalised."""
        ...

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, as timm has it."""
        ...


class FewTokenClassifier(Classifier):
    """A backbone registered with timm, trained from scratch. Subclasses say which."""

    example: ClassVar[str]
    """A name that `encoder.name` may have."""

    def __init__(self, cfg: ClassifierConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.build = build
        self.encoder: VisionEncoder = build.vision(
            num_classes=self.num_classes, arguments=self.encoder_arguments(cfg)
        )
        if not isinstance(self.encoder.backbone, self.backbone_kinds()):
            kinds = " or ".join(kind.__name__ for kind in self.backbone_kinds())
            raise ConfigError(
                f"encoder.name is a {type(self.encoder.backbone).__name__}; this method trains a "
                f"{kinds}, encoder.name={self.example}"
            )

    def backbone_kinds(self) -> tuple[type, ...]:
        """Classes that the backbone may have."""
        raise NotImplementedError

    @property
    def few(self) -> FewTokenBackbone:
        """The backbone by its contract."""
        backbone = self.encoder.backbone
        assert isinstance(backbone, FewTokenBackbone)
        return backbone

    def class_logits(self, images: Tensor) -> Tensor:
        return self.encoder.classify(self.encoder(images))

    def plain_encoder(self) -> VisionEncoder:
        """The plain model of the same size, its weights drawn anew."""
        return self.build.vision(
            num_classes=self.num_classes, name=self.few.plain, checkpoint=None, pretrained=False
        )

    def exports(self) -> tuple[Capability, ...]:
        beside = Gathering(self.encoder, self.plain_encoder, self.few.token_counts())
        return Logits(self), EncoderFeatures(self.encoder), beside


class Gathering(AgainstReference):
    """The backbone beside the plain model, with a picture of which token gathers from where."""

    def groups(self, images: Tensor) -> list[tuple[str, Tensor]]:
        backbone = self.encoder.backbone
        assert isinstance(backbone, FewTokenBackbone)
        return [("gathered by", backbone.gatherers(self.encoder.normalise(images)))]
