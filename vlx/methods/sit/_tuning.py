"""Training on labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlx.blocks.init import trunc_normal_init
from vlx.core.capability import Capability, ClassLogits
from vlx.core.errors import ConfigError
from vlx.core.fields import LABEL, Batch, Needs, ViewSpec
from vlx.core.method import Builder
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures, EncoderOut, VisionEncoder
from vlx.encoders.init import trunc_normal_vit_init
from vlx.families.classifier import draw_mixture, mixing_of, training_view
from vlx.methods.sit._rotation import two_token_encoder
from vlx.methods.sit._task import Task
from vlx.ops.mixing import Mixture, soft_target_rows


class Tuning(Task):
    """Cross-entropy of one or more heads, summed; their mean logits classify."""

    heads: nn.ModuleList

    def __init__(self, cfg: Any, build: Builder, trunk: VisionEncoder) -> None:
        super().__init__(cfg, build, trunk)
        if build.num_classes < 2:
            raise ConfigError("method.objective=finetune needs labels, and the data has none")
        self.num_classes, self.mixing = build.num_classes, mixing_of(cfg)

    @classmethod
    def needs(cls, cfg: Any) -> Needs:
        return Needs(views=(ViewSpec("image", ops=training_view(cfg)),), fields=(LABEL,))

    def inputs(self, out: EncoderOut) -> list[Tensor]:
        """What each head reads: (B, d)."""
        raise NotImplementedError

    def head_logits(self, trunk: VisionEncoder, images: Tensor) -> list[Tensor]:
        """(B, C) of every head."""
        return [head(x) for head, x in zip(self.heads, self.inputs(trunk(images)), strict=True)]

    def embed(self, trunk: VisionEncoder, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        mixture = draw_mixture(self.mixing, ctx) if self.training else Mixture()
        images, targets = self.mixing.apply(
            batch["image"], batch["label"], self.num_classes, mixture
        )
        rows = [soft_target_rows(logits, targets) for logits in self.head_logits(trunk, images)]
        return {"class": torch.stack(rows).sum(0)}  # (B,)

    def losses(self, embeddings: dict[str, Tensor]) -> StepOutput:
        return StepOutput({"class": embeddings["class"].mean()})

    def exports(self, trunk: VisionEncoder) -> tuple[Capability, ...]:
        return MeanLogits(self, trunk), EncoderFeatures(trunk)


class MeanLogits(ClassLogits):
    """The mean of the heads."""

    def __init__(self, task: Tuning, trunk: VisionEncoder) -> None:
        self.task, self.encoder = task, trunk

    def class_logits(self, images: Tensor) -> Tensor:
        return torch.stack(self.task.head_logits(self.encoder, images)).mean(0)


class PooledTuning(Tuning):
    """The current version's head: the class token beside the mean of the patches."""

    def __init__(self, cfg: Any, build: Builder, trunk: VisionEncoder) -> None:
        super().__init__(cfg, build, trunk)
        dim = trunk.spec.dim
        layers = nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, self.num_classes)
        self.heads = nn.ModuleList([nn.Sequential(*layers)])
        trunc_normal_init(self.heads)

    @classmethod
    def build_trunk(cls, build: Builder) -> VisionEncoder:
        return build.vision(init=trunc_normal_vit_init)

    def inputs(self, out: EncoderOut) -> list[Tensor]:
        return [torch.cat([out.prefix[:, 0], out.tokens.mean(1)], dim=1)]


class TokenTuning(Tuning):
    """The first version's: a layer on each task token."""

    def __init__(self, cfg: Any, build: Builder, trunk: VisionEncoder) -> None:
        super().__init__(cfg, build, trunk)
        dim = trunk.spec.dim
        self.heads = nn.ModuleList([nn.Linear(dim, self.num_classes) for _ in range(2)])
        trunc_normal_init(self.heads)

    @classmethod
    def build_trunk(cls, build: Builder) -> VisionEncoder:
        return two_token_encoder(build)

    def inputs(self, out: EncoderOut) -> list[Tensor]:
        return list(out.prefix.unbind(1))
