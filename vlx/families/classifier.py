"""Training on labels: what every classifier shares, whatever its backbone."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from vlx.core.capability import Capability, ClassLogits
from vlx.core.errors import ConfigError
from vlx.core.fields import LABEL, Batch, Needs, ViewOp, ViewSpec
from vlx.core.method import Builder, ParamGroup, Trainable
from vlx.core.step import StepContext, StepOutput
from vlx.families.configs.classifier import ClassifierConfig
from vlx.ops.augment import HorizontalFlip, RandomCrop, RandomErasing, RandomResizedCrop
from vlx.ops.mixing import Mixing, Mixture, soft_target_cross_entropy
from vlx.ops.rand_augment import RandAugment


class Classifier(Trainable):
    """Cross-entropy of class logits under the DeiT recipe. Subclasses give `class_logits`."""

    cfg: Any

    def __init__(self, cfg: ClassifierConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        if build.num_classes < 2:
            raise ConfigError(
                "a classifier needs labels, and the data has none: `vlx data show` says what it has"
            )
        self.num_classes = build.num_classes
        self.mixing = mixing_of(cfg)

    @classmethod
    def needs(cls, cfg: ClassifierConfig) -> Needs:
        return Needs(views=(ViewSpec("image", ops=training_view(cfg)),), fields=(LABEL,))

    def class_logits(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, C)."""
        raise NotImplementedError

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        images, labels = batch["image"], batch["label"]
        images, targets = self.mix(images, labels, ctx)
        return StepOutput({"class": soft_target_cross_entropy(self.class_logits(images), targets)})

    def mix(self, images: Tensor, labels: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Mixup or CutMix in training, smoothing alone otherwise: (images, targets (B, C))."""
        mixture = draw_mixture(self.mixing, ctx) if self.training else Mixture()
        return self.mixing.apply(images, labels, self.num_classes, mixture)

    def param_groups(self) -> list[ParamGroup]:
        return decay_as_models_say(self)

    def exports(self) -> tuple[Capability, ...]:
        return (Logits(self),)


def mixing_of(cfg: ClassifierConfig) -> Mixing:
    return Mixing(mixup_alpha=cfg.mixup, cutmix_alpha=cfg.cutmix, smoothing=cfg.smoothing)


def draw_mixture(mixing: Mixing, ctx: StepContext) -> Mixture:
    """What the step does, the same for all samples of the micro-batch."""
    return mixing.draw(ctx.host_generator("mixing"))


def decay_as_models_say(method: Trainable) -> list[ParamGroup]:
    """As `Trainable`'s; what timm's models list in `no_weight_decay` is not decayed either:
    position tables, class tokens (DeiT's recipe)."""
    exempt = {
        f"{name}.{key}"
        for name, part in method.named_modules()
        if hasattr(part, "no_weight_decay")
        for key in part.no_weight_decay()  # pyright: ignore
    }
    decay, no_decay = Trainable.param_groups(method)
    no_decay.params += [(name, param) for name, param in decay.params if name in exempt]
    decay.params = [(name, param) for name, param in decay.params if name not in exempt]
    return [decay, no_decay]


class Classifies(Protocol):
    """A method that tells the classes of the data apart."""

    def class_logits(self, images: Tensor) -> Tensor: ...


class Logits(ClassLogits):
    """The class logits of a method."""

    def __init__(self, method: Classifies) -> None:
        self.method = method

    def class_logits(self, images: Tensor) -> Tensor:
        return self.method.class_logits(images)


def training_view(cfg: ClassifierConfig) -> tuple[ViewOp, ...]:
    """Crop, flip, RandAugment, erasing, as the config says."""
    if cfg.crop_padding is None:
        crop: ViewOp = RandomResizedCrop(scale=(cfg.crop_scale[0], cfg.crop_scale[1]))
    else:
        crop = RandomCrop(padding=cfg.crop_padding)
    ops = [crop, HorizontalFlip(cfg.flip)]
    if cfg.rand_augment is not None:
        ops.append(RandAugment(magnitude=cfg.rand_augment))
    if cfg.erasing:
        ops.append(RandomErasing(p=cfg.erasing))
    return tuple(ops)
