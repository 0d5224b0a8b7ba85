"""The current version: a corrupted student, a clean teacher, two losses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlx.blocks.init import trunc_normal_init
from vlx.blocks.momentum import follow, rising_momentum
from vlx.blocks.reconstruction_head import ReconstructionHead
from vlx.core.capability import Capability
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch, Needs, ViewSpec
from vlx.core.method import Builder, ParamGroup, Trainable
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures, VisionEncoder
from vlx.encoders.init import trunc_normal_vit_init
from vlx.families.group_masking import CorruptedReconstruction, GroupMasking
from vlx.methods.sit._task import VIEWS, Task
from vlx.ops.augment import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomResizedCrop,
    Solarize,
)
from vlx.ops.contrastive import paired_cross_entropy
from vlx.ops.dist import gather_rows, global_mean, rank
from vlx.ops.targets import masked_l1


class ProjectionHead(nn.Sequential):
    """Class tokens (M, D) to (M, out_dim): three layers with batch norms, the last without
    weights; the activations differ, as in the official code."""

    def __init__(self, dim: int, hidden: int, out_dim: int) -> None:
        super().__init__(
            nn.Linear(dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, out_dim),
            nn.BatchNorm1d(out_dim, affine=False),
        )
        trunc_normal_init(self)


class Student(nn.Module):
    """What is trained: the trunk with drop path, and a head for each loss."""

    def __init__(self, encoder: VisionEncoder, cfg: Any) -> None:
        super().__init__()
        self.encoder, spec = encoder, encoder.spec
        self.projection = ProjectionHead(spec.dim, cfg.projection_hidden, cfg.projection_dim)
        self.reconstruction = ReconstructionHead(spec.dim, spec.patch_size, spec.grid)

    def paint(self, corrupted: Tensor) -> Tensor:
        """Pixels (B, 3, H, H) at the encoder's scale, from the last layer's patch tokens."""
        return self.reconstruction(self.encoder(corrupted, normalised=True).tokens)


class MomentumTask(Task):
    """Reconstruction of destroyed pixels, and the contrast with the teacher's view."""

    def __init__(self, cfg: Any, build: Builder, trunk: VisionEncoder) -> None:
        super().__init__(cfg, build, trunk)
        encoder, spec = build.vision(), trunk.spec
        encoder.load_state_dict(trunk.state_dict())
        self.student = Student(encoder, cfg)
        if spec.num_prefix == 0:
            raise ConfigError("sit reads the class token, and this encoder has none: use a ViT")
        # The teacher's own; it stays in train mode, normalising by its batch, as in the source.
        self.projection = ProjectionHead(spec.dim, cfg.projection_hidden, cfg.projection_dim)
        self.projection.load_state_dict(self.student.projection.state_dict())
        self.projection.requires_grad_(False)
        self.destroy = GroupMasking(cfg, spec.image_size)

    @classmethod
    def needs(cls, cfg: Any) -> Needs:
        ops = (
            RandomResizedCrop(scale=(cfg.crop_scale[0], cfg.crop_scale[1])),
            HorizontalFlip(cfg.flip),
            ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=cfg.jitter),
            Grayscale(cfg.grey),
        )
        first = (*ops, GaussianBlur(p=cfg.blur[0]))
        second = (*ops, GaussianBlur(p=cfg.blur[1]), Solarize(cfg.solarise))
        return Needs(views=(ViewSpec(VIEWS[0], ops=first), ViewSpec(VIEWS[1], ops=second)))

    @classmethod
    def build_trunk(cls, build: Builder) -> VisionEncoder:
        """The teacher's: without drop path and gradient."""
        return build.vision(init=trunc_normal_vit_init, drop_path=0.0).requires_grad_(False)

    def embed(self, trunk: VisionEncoder, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Class tokens (B, D) of both views, the student's and the teacher's; (B,) summed error of
        both views' destroyed values, and their number."""
        views = [trunk.normalise(batch[name]) for name in VIEWS]
        pairs = [self.destroy(clean, ctx, name) for clean, name in zip(views, VIEWS)]
        clean = torch.cat(views)  # (2B, 3, H, H)
        corrupted, mask = (torch.cat(parts) for parts in zip(*pairs))
        out = self.student.encoder(corrupted, normalised=True)
        painted = self.student.reconstruction(out.tokens)
        error, count = (
            found.unflatten(0, (2, -1)).sum(0) for found in masked_l1(painted, clean, mask)
        )
        with torch.no_grad():
            taught = trunk(clean, normalised=True).prefix[:, 0]
        own, theirs = out.prefix[:, 0].chunk(2), taught.chunk(2)
        names = [f"{who}_{view}" for who in ("student", "teacher") for view in VIEWS]
        return dict(zip(names, (*own, *theirs))) | {"error": error, "count": count}

    def losses(self, embeddings: dict[str, Tensor]) -> StepOutput:
        own, taught = (
            torch.cat([embeddings[f"{who}_{view}"] for view in VIEWS])
            for who in ("student", "teacher")
        )
        with torch.no_grad():
            keys = normalize(self.projection(taught).float(), dim=1).chunk(2)
        queries = normalize(self.student.projection(own).float(), dim=1).chunk(2)
        contrast = self.contrast(queries[0], keys[1]) + self.contrast(queries[1], keys[0])
        error, count = embeddings["error"].sum(), embeddings["count"].sum()
        values = 2 * len(embeddings["count"]) * 3 * self.student.encoder.spec.image_size**2
        losses = {
            "contrast": self.cfg.contrast_weight * contrast,
            "recon": self.cfg.recon_weight * global_mean(error, count),
        }
        return StepOutput(losses, {"mask_ratio": count.detach() / values})

    def contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Cross-entropy of one view's (B, E) against the other's of all processes, both of unit
        length, times 2 tau: as MoCo v3 has it (Chen et al. 2021)."""
        scale, first = queries.new_tensor(1 / self.cfg.temperature), rank() * len(queries)
        loss = paired_cross_entropy(queries, gather_rows(keys), scale, first)
        return 2 * self.cfg.temperature * loss

    def after_step(self, trunk: VisionEncoder, ctx: StepContext) -> None:
        momentum = rising_momentum(self.cfg.teacher_momentum, ctx.step, ctx.total_steps)
        follow(trunk, self.student.encoder, momentum)
        follow(self.projection, self.student.projection, momentum)

    def param_groups(self, method: Trainable) -> list[ParamGroup]:
        """As the source: tokens and the position table are decayed, biases and norms are not."""
        return Trainable.param_groups(method)

    def exports(self, trunk: VisionEncoder) -> tuple[Capability, ...]:
        corrupt = partial(self.destroy, view=VIEWS[0])
        return EncoderFeatures(trunk), CorruptedReconstruction(trunk, corrupt, self.student.paint)
