"""SiT: self-supervised vision transformer (Atito, Awais and Kittler, 2021; arXiv v3 of 2022).

A ViT is its own autoencoder and learns a second task at once. `variant: momentum`, the current
version: the student sees a corrupted crop, paints the clean one back from its patch tokens, and its
class token finds, among the images of the batch, the one that a teacher, its moving average, gave
the class token of the other, clean crop. `variant: rotation`, the first version of 2021: two task
tokens, of which one tells by how many quarters the view is turned and the other finds the other
view; no teacher; the three losses are weighed by learned numbers. `objective: finetune` trains on
labels: for `momentum` an MLP on the class token beside the mean of the patches, for `rotation` a
layer on each task token.

B batch, N patches, D width, H side of the image.
The run's encoder, what is evaluated, saved as `encoder` and fine-tuned, is the teacher's trunk (the
official checkpoint holds both and does not say which).
Departures, momentum: of GMML's corruption see gmml; a teacher's reconstruction head, which exists
there and does nothing, is left out; fine-tuning is the first version's recipe, since the current
one publishes none. Rotation: a noise and an alien rectangle is drawn at once, `max_rectangles` at
most; the alien image is one of the sample's group of four, clean behind it and distorted by noise
before it in the batch, but for aliens of its own; it is never the image itself. The linear
test of the source, a trunk frozen in train mode, and its hidden layer with tanh are left out:
`linear-probe` is our protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from vlx.core.capability import Capability
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch, Needs
from vlx.core.method import Builder, ParamGroup, Trainable
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.families.configs.classifier import ClassifierConfig
from vlx.families.configs.group_masking import Corruption, GroupMaskingConfig
from vlx.methods.sit._momentum import MomentumTask
from vlx.methods.sit._rotation import RotationTask
from vlx.methods.sit._task import Task
from vlx.methods.sit._tuning import PooledTuning, TokenTuning
from vlx.ops.gradients import clip_each

PAPER = Paper(
    number=11,
    slug="sit",
    title="SiT: Self-supervised vIsion Transformer",
    year=2021,
    venue="arXiv",
    url="https://arxiv.org/abs/2104.03602",
    family="masked",
    commands=("pretrain-mim", "finetune"),
    modalities=("image",),
    trainable_params=41_827_587,
    gmacs=18.76,
    backbones=("sit_tiny_patch16_224", "sit_small_patch16_224", "sit_base_patch16_224"),
)


class Variant(Enum):
    """Which version of the paper."""

    momentum = "momentum"
    rotation = "rotation"


class Objective(Enum):
    """What is trained for."""

    pretrain = "pretrain"
    finetune = "finetune"


@dataclass(kw_only=True)
class SitConfig(ClassifierConfig, GroupMaskingConfig):
    variant: Variant = Variant.momentum
    """momentum: the current version. rotation: that of 2021, for an encoder with two task tokens
    (encoder.name=sit_base_patch16_224)."""
    objective: Objective = Objective.pretrain
    """pretrain, or finetune: train on labels, from encoder.checkpoint. rand_augment, erasing,
    mixup, cutmix, smoothing and crop_padding are of finetune alone."""
    temperature: float = 0.2
    """Divides cosines. Official code: 0.2; of 2021: 0.5."""
    projection_dim: int = 256
    """Width in which views are compared. Official code: 256; of 2021: 512."""
    projection_hidden: int = 4096
    """momentum: hidden width of the projection. Official code: 4096."""
    contrast_weight: float = 1.0
    """momentum: weight of the contrast, which is multiplied by twice the temperature beside it.
    Ours: for ablations; the paper has 1."""
    recon_weight: float = 1.0
    """momentum: weight of the reconstruction. Official code: 1; its readme: about 5 for small sets.
    """
    teacher_momentum: float = 0.996
    """momentum: share of its weights that the teacher keeps at the first step, rising to 1 by a
    half-cosine. Official code: 0.996."""
    noise_max: float = 0.5
    """momentum: most of the image that is destroyed, 0..1; the share is drawn from [0.5, this].
    Official code: 0.5."""
    corruptions: list[Corruption] = field(default_factory=lambda: [Corruption.zeros])
    """momentum: types of corruption, one drawn per image: noise, zeros, shift. Official code:
    zeros."""
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Area of the random resized crop, low and high, 0..1. Official code: 0.2, 1; of 2021 and
    finetune: 0.08, 1."""
    jitter: float = 0.8
    """Probability of the colour jitter: 0.4, 0.4, 0.2 and a hue of 0.1; rotation: 0.4 and no hue.
    Official code: 0.8; of 2021: 1."""
    grey: float = 0.2
    """momentum: probability of a view without colour. Official code: 0.2."""
    blur: list[float] = field(default_factory=lambda: [1.0, 0.1])
    """momentum: probabilities of a Gaussian blur of radius 0.1 to 2 pixels, of the first and second
    view. Official code: 1, 0.1."""
    solarise: float = 0.2
    """momentum: probability of solarising the second view. Official code: 0.2."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if len(self.blur) != 2:
            raise ConfigError(f"method.blur={self.blur} must be two probabilities, one a view")


TASKS: Mapping[tuple[Objective, Variant], type[Task]] = {
    (Objective.pretrain, Variant.momentum): MomentumTask,
    (Objective.pretrain, Variant.rotation): RotationTask,
    (Objective.finetune, Variant.momentum): PooledTuning,
    (Objective.finetune, Variant.rotation): TokenTuning,
}


class Sit(Trainable):
    Config = SitConfig
    couples_batch = True

    def __init__(self, cfg: SitConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        task = TASKS[cfg.objective, cfg.variant]
        self.encoder = task.build_trunk(build)
        self.task = task(cfg, build, self.encoder)

    @classmethod
    def needs(cls, cfg: SitConfig) -> Needs:
        return TASKS[cfg.objective, cfg.variant].needs(cfg)

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        return self.task.embed(self.encoder, batch, ctx)

    def losses(self, embeddings: dict[str, Tensor], ctx: StepContext) -> StepOutput:
        return self.task.losses(embeddings)

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        return self.losses(self.embed(batch, ctx), ctx)

    def before_update(self, ctx: StepContext) -> None:
        if self.cfg.clip_each is not None:
            clip_each(self.parameters(), self.cfg.clip_each)

    def after_step(self, ctx: StepContext) -> None:
        self.task.after_step(self.encoder, ctx)

    def param_groups(self) -> list[ParamGroup]:
        return self.task.param_groups(self)

    def exports(self) -> tuple[Capability, ...]:
        return self.task.exports(self.encoder)


METHOD = Sit
