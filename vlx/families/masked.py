"""What masked autoencoders that repaint patches have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlx.core.capability import Reconstruction
from vlx.core.fields import Needs, ViewSpec
from vlx.core.step import StepContext
from vlx.encoders.base import EncoderSpec, VisionEncoder
from vlx.families.configs.masked import MaskedConfig, PatchDecoderConfig
from vlx.ops.augment import HorizontalFlip, RandomResizedCrop
from vlx.ops.patches import unpatchify, upsample_mask

Paint = Callable[[Tensor, StepContext], tuple[Tensor, Tensor]]
"""Normalised images to their patches as pixels (B, N, P) and the mask (B, N), True = hidden."""


def random_crop_needs(cfg: MaskedConfig) -> Needs:
    """One image: a random resized crop of `cfg.crop_scale`, flipped as often as `cfg.flip`."""
    crop = RandomResizedCrop(scale=(cfg.crop_scale[0], cfg.crop_scale[1]))
    return Needs(views=(ViewSpec("image", ops=(crop, HorizontalFlip(cfg.flip))),))


def decoder_sizes(spec: EncoderSpec, cfg: PatchDecoderConfig) -> dict[str, Any]:
    """Keywords of a `PatchDecoder` under this encoder."""
    return {
        "encoder_dim": spec.dim,
        "grid": spec.grid,
        "patch_values": spec.patch_size**2 * 3,
        "dim": cfg.decoder_dim,
        "depth": cfg.decoder_depth,
        "heads": cfg.decoder_heads,
    }


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
