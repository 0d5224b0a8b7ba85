"""The first version, of 2021: turns, the other view, and the whole picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vlx.blocks.init import trunc_normal_init
from vlx.core.capability import Capability
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch, Needs, ViewSpec
from vlx.core.method import Builder
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures, VisionEncoder
from vlx.families.group_masking import CorruptedReconstruction
from vlx.methods.sit._distort import distort
from vlx.methods.sit._task import VIEWS, Task
from vlx.methods.sit._vit import MODELS
from vlx.ops.augment import ColorJitter, HorizontalFlip, RandomResizedCrop
from vlx.ops.contrastive import nt_xent

LOSSES = ("rotation", "contrast", "recon")
SHARPNESS = (1.0, 1.0, 0.5)
"""a of each: cross-entropies 1, absolute error 0.5."""


def turn(images: Tensor, quarters: Tensor) -> Tensor:
    """Each square image (B, C, H, H) turned clockwise by `quarters (B,)` of a circle."""
    turned = torch.stack([images.rot90(-k, (2, 3)) for k in range(4)])
    return turned[quarters, torch.arange(len(images), device=images.device)]


class LearnedWeights(nn.Module):
    """Sum of exp(-a s) L + s / 2 over tasks, s learned from 1: the larger s, the less a task
    counts (Kendall et al. 2018, in the released code's form)."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.ones(len(LOSSES)))

    def forward(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.exp(-sharpness * s) * losses[name] + 0.5 * s
            for name, sharpness, s in zip(LOSSES, SHARPNESS, self.s)
        }


def two_token_encoder(build: Builder) -> VisionEncoder:
    """The run's encoder. Raises `ConfigError` where it has not two tokens beside the patches."""
    encoder = build.vision()
    if encoder.spec.num_prefix != 2:
        raise ConfigError(
            f"method.variant=rotation needs a ViT with two task tokens, and this one has "
            f"{encoder.spec.num_prefix}: use encoder.name={MODELS[-1]}"
        )
    return encoder


class RotationTask(Task):
    """Three tasks on views that are turned after their augmentation, then distorted."""

    def __init__(self, cfg: Any, build: Builder, trunk: VisionEncoder) -> None:
        super().__init__(cfg, build, trunk)
        spec = trunk.spec
        self.rotation_head = nn.Linear(spec.dim, 4)
        self.contrast_head = nn.Linear(spec.dim, cfg.projection_dim)
        side = spec.patch_size
        self.to_pixels = nn.ConvTranspose2d(spec.dim, 3, kernel_size=side, stride=side)
        self.weights = LearnedWeights()
        trunc_normal_init(self)

    @classmethod
    def needs(cls, cfg: Any) -> Needs:
        ops = (
            RandomResizedCrop(scale=(cfg.crop_scale[0], cfg.crop_scale[1])),
            HorizontalFlip(cfg.flip),
            ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, p=cfg.jitter),
        )
        return Needs(views=tuple(ViewSpec(name, ops=ops) for name in VIEWS))

    @classmethod
    def build_trunk(cls, build: Builder) -> VisionEncoder:
        return two_token_encoder(build)

    def embed(self, trunk: VisionEncoder, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Contrast vectors (B, E) of both views; (B,) means over both of the rotation's
        cross-entropy, of the painting's absolute error and of right guesses."""
        quarters = torch.cat(
            [(ctx.uniform(batch[name], 1, f"{name}/turn")[:, 0] * 4).long() for name in VIEWS]
        )
        clean = turn(torch.cat([trunk.normalise(batch[name]) for name in VIEWS]), quarters)
        halves = clean.chunk(2)
        seen = torch.cat([self.corrupt(half, ctx, name) for half, name in zip(halves, VIEWS)])
        out = trunk(seen, normalised=True)
        logits = self.rotation_head(out.prefix[:, 0]).float()  # (2B, 4)
        vectors = self.contrast_head(out.prefix[:, 1]).chunk(2)
        rows = {
            "rotation": cross_entropy(logits, quarters, reduction="none"),
            "recon": (self.to_picture(trunk, out.tokens) - clean).abs().mean((1, 2, 3)),
            "right": (logits.argmax(1) == quarters).float(),
        }
        means = {name: row.unflatten(0, (2, -1)).mean(0) for name, row in rows.items()}
        return dict(zip(VIEWS, vectors)) | means

    def losses(self, embeddings: dict[str, Tensor]) -> StepOutput:
        found = {
            "rotation": embeddings["rotation"].mean(),
            "contrast": nt_xent(embeddings[VIEWS[0]], embeddings[VIEWS[1]], self.cfg.temperature),
            "recon": embeddings["recon"].mean(),
        }
        metrics = {f"raw_{name}": loss.detach() for name, loss in found.items()}
        metrics["rotation_accuracy"] = embeddings["right"].detach().mean()
        return StepOutput(self.weights(found), metrics)

    def corrupt(self, clean: Tensor, ctx: StepContext, view: str) -> Tensor:
        """A view's distorted pictures."""
        return distort(clean, ctx, view, self.cfg.max_rectangles)

    def to_picture(self, trunk: VisionEncoder, tokens: Tensor) -> Tensor:
        """Patch tokens (B, N, D) to pixels (B, 3, H, H) at the encoder's scale."""
        return self.to_pixels(tokens.transpose(1, 2).unflatten(2, trunk.spec.grid))

    def exports(self, trunk: VisionEncoder) -> tuple[Capability, ...]:
        def corrupt(clean: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
            seen = self.corrupt(clean, ctx, VIEWS[0])
            return seen, (seen != clean).any(1, keepdim=True)

        def paint(seen: Tensor) -> Tensor:
            return self.to_picture(trunk, trunk(seen, normalised=True).tokens)

        return EncoderFeatures(trunk), CorruptedReconstruction(trunk, corrupt, paint)
