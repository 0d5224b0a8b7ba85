"""Images as rows of patches and back (MAE's layout: row, column, channel last)."""

from __future__ import annotations

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
