"""Connected rectangles of an image destroyed and painted back: what GMML and SiT share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlx.core.capability import Reconstruction
from vlx.core.step import StepContext
from vlx.encoders.base import VisionEncoder
from vlx.families.configs.group_masking import Corruption, GroupMaskingConfig
from vlx.ops.corrupt import (
    DRAWS_PER_RECTANGLE,
    Filler,
    group_partner,
    noise_filler,
    shift_filler,
    union_mask,
    zeros_filler,
)

ALIEN_GROUP = 4
FILLERS: dict[Corruption, Filler] = {
    Corruption.noise: noise_filler,
    Corruption.zeros: zeros_filler,
    Corruption.shift: shift_filler,
}

Corrupt = Callable[[Tensor, StepContext], tuple[Tensor, Tensor]]
"""Normalised images (B, 3, H, H) to the corrupted ones and the mask (B, 1, H, H), True =
destroyed."""


class GroupMasking:
    """The corruption of a config, for square images of `size` pixels."""

    def __init__(self, cfg: GroupMaskingConfig, size: int) -> None:
        self.cfg, self.size = cfg, size
        self.fillers = [FILLERS[kind] for kind in cfg.corruptions]
        self.alien_share = 1 / (len(self.fillers) + 1)

    def __call__(self, clean: Tensor, ctx: StepContext, view: str) -> tuple[Tensor, Tensor]:
        """The corrupted view and its mask (B, 1, H, H), True = destroyed.

        Half of the images (for one type) carry the corruption over [0.5, noise_max] of their area;
        the others, from their clean view, an alien's rectangles over alien_max. view: its name,
        by which the draws of two views differ.
        """
        u = ctx.uniform(clean, 6, f"{view}/image")
        mask, alien = self._mask(clean, ctx, view, u)
        normal = ctx.normal(clean, clean[0].numel(), f"{view}/noise")
        fills = torch.stack([fill(clean, normal, u[:, 2:4]) for fill in self.fillers])
        kind = (u[:, 4] * len(self.fillers)).long()
        own = fills[kind, torch.arange(len(clean), device=clean.device)]
        other = clean[group_partner(u[:, 5], ctx.sample_offset, ALIEN_GROUP)]
        filled = torch.where(alien[:, None, None, None], other, own)
        return torch.where(mask, filled, clean), mask

    def mask(self, images: Tensor, ctx: StepContext, view: str) -> Tensor:
        """The mask (B, 1, H, H) alone, which depends on no pixel of `images (B, 3, H, H)`."""
        return self._mask(images, ctx, view, ctx.uniform(images, 6, f"{view}/image"))[0]

    def _mask(
        self, images: Tensor, ctx: StepContext, view: str, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mask, and which images (B,) take an alien's pixels; u: (B, 6), drawn."""
        cfg, draws = self.cfg, DRAWS_PER_RECTANGLE * self.cfg.max_rectangles
        alien = u[:, 1] < self.alien_share
        low = min(0.5, cfg.noise_max)
        share = low + u[:, 0] * (cfg.noise_max - low)
        mask = union_mask(
            ctx.uniform(images, draws, f"{view}/rectangles"),
            torch.where(alien, cfg.alien_max, share),
            self.size,
            align=cfg.align,
            largest=cfg.block_max,
        )
        return mask, alien


class CorruptedReconstruction(Reconstruction):
    """The corrupted picture, and its destroyed pixels repainted.

    predict: corrupted normalised images to pixels (B, 3, H, H) at the encoder's scale.
    """

    def __init__(
        self, encoder: VisionEncoder, corrupt: Corrupt, predict: Callable[[Tensor], Tensor]
    ) -> None:
        self.encoder, self.corrupt, self.predict = encoder, corrupt, predict

    def reconstruct(self, images: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        corrupted, mask = self.corrupt(self.encoder.normalise(images), ctx)
        painted = self.encoder.denormalise(self.predict(corrupted)).clamp(0, 1)
        seen = self.encoder.denormalise(corrupted).clamp(0, 1)
        return images.where(~mask, seen), images.where(~mask, painted)
