"""VL2V-ADiP: align, distil, predict (Addepalli et al., CVPR 2024; arXiv 2310.08255 of 2023).

A vision-only student learns from a CLIP of which only the embeddings are at hand, for domains that
neither training set shows. Stage 1 (`align`) trains one linear layer that turns features of the
frozen student to CLIP's embeddings of the same image and of its class's name; stage 2 (`distil`)
holds this layer and trains the student by the same loss. Classes are then told by their names.

B batch, D student width, E joint width, C classes.
The stages are two runs: the second reads the layer that the first saved, and the same student.
Leave-one-domain-out is a matter of the splits (glyphs: data.train_split=train:FACE+FACE
data.test_split=test:FACE), with a first stage of its own for each domain left out.
A batch has as many images of each training domain (data.balance_domains). Both stages end with
SWAD's average (train.swad), chosen by held-out parts of the training domains (data.val_split); the
second starts from the single model of the first that was best on them (train.keep_best; in the
reference, of those after 1000 steps).
Departures: each model normalises images with its own statistics, where the reference code gives
CLIP ImageNet's. Validation is the mean over all held-out images, there of the domains' means, first
after 200 steps, there also after one; a fifth is held out by a hash, there at random. A run goes on
when the valley has ended. SWAD counts segments as the code does (engine/swad.py). A segment ends
with its evaluation, as in the reference's second stage of ViT-B; its other stages let a segment run
on (reset after 3000, 4000 and 5000 steps alone).
`cross_entropy` and `kl` are baselines of ours over the same cosine logits.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, normalize

from vlx.blocks.frozen import Frozen
from vlx.blocks.logit_scale import LogitScale
from vlx.core.capability import Capability, OpenVocabulary
from vlx.core.config import MethodConfig
from vlx.core.errors import CheckpointError, ConfigError
from vlx.core.fields import LABEL, Batch, Needs, ViewOp, ViewSpec
from vlx.core.method import Builder, Trainable
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures, VisionEncoder
from vlx.encoders.checkpoint import ADAPTER_FILE, read_best, read_weights
from vlx.encoders.clip_weights import load_clip
from vlx.families.classifier import Logits
from vlx.families.dual_encoder import Towers
from vlx.ops.augment import ColorJitter, Grayscale, HorizontalFlip, RandomResizedCrop
from vlx.ops.contrastive import mean_of_templates
from vlx.ops.precision import without_autocast
from vlx.ops.resample import Interpolation, resize

PAPER = Paper(
    number=42,
    slug="vl2v-adip",
    title="Leveraging Vision-Language Models for Improving Domain Generalization in Image "
    "Classification",
    year=2024,
    venue="CVPR",
    url="https://arxiv.org/abs/2310.08255",
    family="distillation",
    commands=("finetune",),
    modalities=("image", "text"),
    trainable_params=393_728,
)

log = logging.getLogger("vlx")
_PART = "projection"


class Stage(Enum):
    """What is trained, and by which loss."""

    align = "align"
    distil = "distil"
    joint = "joint"
    white_box = "white_box"
    cross_entropy = "cross_entropy"
    kl = "kl"


@dataclass(kw_only=True)
class Vl2vAdipConfig(MethodConfig):
    stage: Stage = Stage.align
    """align (stage 1: the projection alone), distil (stage 2: the student alone); joint (ablation:
    both at once), white_box (the student is the teacher's own image tower, one stage); baselines
    that train both at once: cross_entropy, kl (towards the teacher's class probabilities)."""
    projection: str | None = None
    """distil: the run directory of stage 1, of which the best model by train.keep_best is taken, or
    what it ended with where it kept none; or a file, e.g. its adapter.safetensors."""
    image_ratio: float = 0.5
    """Lambda: share of the loss towards the teacher's image embedding, 0..1; the rest is towards
    its embedding of the class's name. Paper: 0.5."""
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}"])
    """Sentences that name a class, {} where its name goes; their embeddings are averaged. Official
    code: one, without a full stop."""
    teacher_weights: str | None = None
    """Weights of the teacher's two towers: a Hugging Face CLIPModel (directory or file), a file of
    OpenAI's or open_clip's names, or a run of vlx align clip."""
    embed_dim: int = 512
    """Width of the teacher's joint space. CLIP ViT-B and RN101: 512; ViT-L: 768; RN50: 1024."""
    crop_scale: list[float] = field(default_factory=lambda: [0.7, 1.0])
    """Area of the random resized crop, low and high, 0..1. Official code: 0.7, 1."""
    flip: float = 0.5
    """Probability of a horizontal flip. Official code: 0.5."""
    jitter: float = 0.3
    """Strength of the jitter of brightness, contrast, saturation and hue. Official code: 0.3."""
    grey: float = 0.1
    """Probability of a grey image. Official code: 0.1."""

    def __post_init__(self) -> None:
        for name in ("image_ratio", "flip", "grey"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"method.{name}={value} must lie in 0..1")
        for template in self.templates:
            if "{}" not in template:
                raise ConfigError(
                    f"method.templates: '{template}' has no {{}} where the class name goes, e.g. "
                    "'a photo of a {}'"
                )
        if not self.templates:
            raise ConfigError("method.templates=[] names no class: use e.g. ['a photo of a {}']")
        if self.projection is not None and self.stage is not Stage.distil:
            raise ConfigError(
                f"method.projection is read by method.stage=distil, not by {self.stage.value}"
            )


def cosine_losses(z: Tensor, image: Tensor, text: Tensor, image_ratio: float) -> dict[str, Tensor]:
    """The loss of both stages in its two parts, each already weighted; their sum lies in -1..1.

    z: (B, E), what the student says; image, text: (B, E), the teacher's embeddings of the images
    and of their classes' names. Lengths do not matter.
    """
    z = normalize(z.float(), dim=-1)
    towards = {"image": (image, image_ratio), "text": (text, 1 - image_ratio)}
    return {
        name: -share * (z * normalize(target.float(), dim=-1)).sum(-1).mean()
        for name, (target, share) in towards.items()
    }


def towards_embeddings(
    method: Vl2vAdip, images: Tensor, z: Tensor, labels: Tensor | None
) -> dict[str, Tensor]:
    """The paper's loss, of both stages: towards the teacher's image and class embeddings."""
    assert labels is not None
    taught, names = method.teach(images), method.class_weights()
    return cosine_losses(z, taught, names[labels], method.cfg.image_ratio)


def towards_classes(
    method: Vl2vAdip, images: Tensor, z: Tensor, labels: Tensor | None
) -> dict[str, Tensor]:
    """Baseline: cross-entropy over the cosine logits."""
    assert labels is not None
    return {"class": cross_entropy(method.logits(z, method.class_weights()), labels)}


def towards_probabilities(
    method: Vl2vAdip, images: Tensor, z: Tensor, labels: Tensor | None
) -> dict[str, Tensor]:
    """Baseline: the teacher's class probabilities of the same images."""
    names = method.class_weights()
    student, teacher = (method.logits(x, names).log_softmax(-1) for x in (z, method.teach(images)))
    return {"kl": kl_div(student, teacher, log_target=True, reduction="batchmean")}


class Plan(NamedTuple):
    """What a stage trains, from what, and by which loss."""

    student: bool = True
    """Whether the student is trained."""
    projection: bool = True
    """Whether the projection is trained."""
    loss: Callable[[Vl2vAdip, Tensor, Tensor, Tensor | None], dict[str, Tensor]] = (
        towards_embeddings
    )
    """(method, images in 0..1, z (B, E), labels (B,)) to losses."""
    reads_labels: bool = True
    from_stage_one: bool = False
    """The projection is the one that stage 1 trained."""
    teachers_tower: bool = False
    """The student is a copy of the teacher's image tower, which needs no projection."""


PLANS = {
    Stage.align: Plan(student=False),
    Stage.distil: Plan(projection=False, from_stage_one=True),
    Stage.joint: Plan(),
    Stage.white_box: Plan(projection=False, teachers_tower=True),
    Stage.cross_entropy: Plan(loss=towards_classes),
    Stage.kl: Plan(loss=towards_probabilities, reads_labels=False),
}


def load_projection(projection: nn.Linear, path: str) -> None:
    """Put the layer that stage 1 trained into this one: nothing else of its run, and all of it."""
    file = Path(path).expanduser()
    saved = read_best(file) if file.is_dir() else None
    if saved is None:
        file = file / ADAPTER_FILE if file.is_dir() else file
        saved = read_weights(file) if file.is_file() else {}
    wanted = {f"{_PART}.{name}": value for name, value in projection.state_dict().items()}
    for name, value in wanted.items():
        shape = tuple(saved[name].shape) if name in saved else "nothing"
        if shape != tuple(value.shape):
            raise CheckpointError(
                f"method.projection={path}: {file.name} holds {shape} as {name}, this model needs "
                f"{tuple(value.shape)}: give a run of method.stage=align with the same encoder and "
                "method.embed_dim"
            )
    projection.load_state_dict({name: saved[f"{_PART}.{name}"] for name in projection.state_dict()})


class Vl2vAdip(Trainable):
    Config = Vl2vAdipConfig

    def __init__(self, cfg: Vl2vAdipConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        if build.num_classes < 2:
            raise ConfigError(
                "vl2v-adip needs labels, and the data has none: `vlx data show` says what it has"
            )
        unnamed = tuple(f"class {number}" for number in range(build.num_classes))
        self.class_names = build.class_names or unnamed
        towers = Towers(build, cfg.embed_dim, role="teacher")
        scale = LogitScale()
        self._load_teacher(towers, scale, build)
        self.plan = PLANS[cfg.stage]
        if self.plan.teachers_tower:
            side = towers.image.spec.image_size
            if side != build.image_size:
                raise ConfigError(
                    f"method.stage=white_box trains the teacher's tower, which sees {side} pixels: "
                    f"set encoder.image_size={side}"
                )
            self.student: VisionEncoder = copy.deepcopy(towers.image)
            self.projection: nn.Module = nn.Identity()
        else:
            self.student = build.vision()
            width = getattr(self.student.backbone, "head_hidden_size", self.student.spec.dim)
            self.projection = nn.Linear(width, cfg.embed_dim)
        self.teacher, self.logit_scale = Frozen(towers), Frozen(scale)
        self.student.requires_grad_(self.plan.student)
        self.projection.requires_grad_(self.plan.projection)
        self.frozen_base = not self.plan.student
        if self.plan.from_stage_one and build.load_weights:
            self._load_stage_one(cfg.projection)
        # Not saved: the teacher's weights and the class names say what it is.
        self.register_buffer("classes", None, persistent=False)
        self.register_load_state_dict_post_hook(lambda method, _: setattr(method, "classes", None))

    def _load_teacher(self, towers: Towers, scale: LogitScale, build: Builder) -> None:
        if not build.load_weights:
            return
        if self.cfg.teacher_weights is not None:
            load_clip(towers, scale, self.cfg.teacher_weights)
        else:
            log.warning(
                "the teacher has random weights and teaches nothing: set method.teacher_weights "
                "to a run of vlx align clip, or to CLIP's published weights"
            )

    def _load_stage_one(self, path: str | None) -> None:
        if path is None:
            raise ConfigError(
                "method.stage=distil needs the projection of stage 1: run method.stage=align "
                "first, then set method.projection to its run directory"
            )
        assert isinstance(self.projection, nn.Linear)
        load_projection(self.projection, path)

    @classmethod
    def needs(cls, cfg: Vl2vAdipConfig) -> Needs:
        ops: list[ViewOp] = [
            RandomResizedCrop(
                scale=(cfg.crop_scale[0], cfg.crop_scale[1]), interpolation=Interpolation.bilinear
            ),
            HorizontalFlip(cfg.flip),
        ]
        if cfg.jitter:
            ops.append(ColorJitter(cfg.jitter, cfg.jitter, cfg.jitter, cfg.jitter))
        if cfg.grey:
            ops.append(Grayscale(cfg.grey))
        fields = (LABEL,) if PLANS[cfg.stage].reads_labels else ()
        return Needs(views=(ViewSpec("image", ops=tuple(ops)),), fields=fields)

    def frozen_parts(self) -> tuple[str, ...]:
        return () if self.plan.student else ("student",)

    def inserted(self) -> Sequence[str]:
        return () if self.plan.teachers_tower else (f"{_PART}.",)

    def train(self, mode: bool = True) -> Vl2vAdip:
        """Batch norms keep their statistics, whatever is trained; a frozen student runs as it will
        be used."""
        super().train(mode)
        if not self.plan.student:
            self.student.eval()
        for part in self.student.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self

    def project(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns z (B, E), not of unit length."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.plan.student):
            # Without a head `classify` is the model's pooling: the class token after the final
            # norm, the mean of class and distillation token, or the mean of a map.
            features = self.student.classify(self.student(images))  # (B, D)
        return self.projection(features)

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns the teacher's (B, E) of unit length."""
        towers = self.teacher.module
        return towers.embed_images(resize(images, towers.image.spec.image_size))

    def name_weights(self, class_names: Sequence[str]) -> Tensor:
        """The teacher's embedding of each name, (C, E) float32 of unit length."""
        towers = self.teacher.module
        like = towers.projection.weight
        if like.is_meta:  # a dry run counts what every step costs
            return torch.empty(len(class_names), like.shape[0], device="meta")
        words = [name.replace("_", " ") for name in class_names]
        # Not an evaluator's inference tensors: training uses them too.
        with torch.inference_mode(False), torch.no_grad(), without_autocast(like):
            sentences = [
                towers.embed_texts([template.replace("{}", word) for word in words]).float()
                for template in self.cfg.templates
            ]
            return mean_of_templates(torch.stack(sentences, dim=1))

    def class_weights(self) -> Tensor:
        """`name_weights` of the data's classes, made at the first use of the loaded weights."""
        if self.classes is None:
            self.classes = self.name_weights(self.class_names)
        return self.classes

    def logits(self, z: Tensor, names: Tensor) -> Tensor:
        """Scaled cosines (B, C) of z (B, E) and class weights (C, E) of unit length."""
        with without_autocast(z):
            return self.logit_scale.module() * normalize(z.float(), dim=-1) @ names.T

    def class_logits(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, C) for the classes of the data."""
        return self.logits(self.project(images), self.class_weights())

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        images = batch["image"]
        labels = batch["label"] if self.plan.reads_labels else None
        return StepOutput(self.plan.loss(self, images, self.project(images), labels))

    def exports(self) -> tuple[Capability, ...]:
        return Logits(self), NamedClasses(self), EncoderFeatures(self.student)


class NamedClasses(OpenVocabulary):
    """Among any classes; the embeddings of the names that were asked last are kept."""

    def __init__(self, method: Vl2vAdip) -> None:
        self.method = method
        self._names: tuple[str, ...] = ()
        self._weights: Tensor | None = None

    def logits_of(self, images: Tensor, class_names: Sequence[str]) -> Tensor:
        names = tuple(class_names)
        if self._weights is None or names != self._names:
            self._names, self._weights = names, self.method.name_weights(names)
        return self.method.logits(self.method.project(images), self._weights)


METHOD = Vl2vAdip
