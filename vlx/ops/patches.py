"""Images as rows of patches and back (MAE's layout: row, column, channel last)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """`(B, C, h*patch, w*patch)` to `(B, h*w, patch*patch*C)`, patches row-major."""
    b, c, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(f"image {height}x{width} is not a multiple of the patch size {patch}")
    h, w = height // patch, width // patch
    x = images.reshape(b, c, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, h * w, patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for a grid of (rows, columns)."""
    b, _, values = patches.shape
    h, w = grid
    c = values // (patch * patch)
    x = patches.reshape(b, h, w, patch, patch, c).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, c, h * patch, w * patch)


def upsample_mask(mask: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """A patch mask `(B, h*w)` as pixels, `(B, 1, h*patch, w*patch)`."""
    pixels = mask.reshape(mask.shape[0], 1, *grid)
    return pixels.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def paint_groups(image: Tensor, groups: Tensor) -> Tensor:
    """A picture of what became of an image's patches.

    image: (3, H, W) in 0..1, square; groups: (P,) int64, a number per patch. Patches that share a
    number get their common mean colour, a patch with a number of its own stays, -1 is dim and red.
    """
    side = math.isqrt(len(groups))
    patch = image.shape[-1] // side
    pixels = patchify(image[None], patch)[0]  # (P, p*p*3)
    colours = pixels.view(len(groups), -1, 3).mean(1)  # (P, 3)
    members = (groups[:, None] == groups[None]).to(colours.dtype)  # (P, P)
    shared = (members @ colours) / members.sum(1, keepdim=True)
    flat = shared.repeat(1, patch * patch)
    alone = members.sum(1, keepdim=True) == 1
    painted = torch.where(alone, pixels, flat)
    red = pixels.new_tensor([0.3, 0.05, 0.05]).repeat(patch * patch)
    painted = torch.where(groups[:, None] < 0, pixels * 0.3 + red, painted)
    return unpatchify(painted[None], patch, (side, side))[0]
