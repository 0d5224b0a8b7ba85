"""What masked autoencoders that repaint patches have in common."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vlx.core.capability import Reconstruction
from vlx.core.step import StepContext
from vlx.encoders.base import VisionEncoder
from vlx.ops.patches import unpatchify, upsample_mask

Paint = Callable[[Tensor, StepContext], tuple[Tensor, Tensor]]
"""Normalised images to their patches as pixels (B, N, P) and the mask (B, N), True = hidden."""


class PatchReconstruction(Reconstruction):
    """Pictures with their hidden patches filled by the model, the visible ones untouched."""

    def __init__(self, encoder: VisionEncoder, paint: Paint) -> None:
        self.encoder, self.paint = encoder, paint

    def reconstruct(self, images: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        patch, grid = self.encoder.spec.patch_size, self.encoder.spec.grid
        patches, mask = self.paint(self.encoder.normalise(images), ctx)
        painted = self.encoder.denormalise(unpatchify(patches, patch, grid)).clamp(0, 1)
        hidden = upsample_mask(mask, patch, grid)  # (B, 1, H, W)
        return images.masked_fill(hidden, 0.5), images.where(~hidden, painted)
