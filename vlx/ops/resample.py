"""Cropping and resizing a batch with a box per sample, antialiased like PIL.

Two batched matrix products: out = rows (B, out, H) @ image @ columns (B, W, out). Each matrix
holds the normalised filter weights of its sample's box, so any box and any flip cost the same.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class Interpolation(Enum):
    """Filter and its support in source pixels at scale 1."""

    bilinear = 1.0
    bicubic = 2.0


def _kernel(x: Tensor, interpolation: Interpolation) -> Tensor:
    x = x.abs()
    if interpolation is Interpolation.bilinear:
        return (1.0 - x).clamp(min=0.0)
    a = -0.5  # the Catmull-Rom coefficient that PIL and antialiased torchvision use
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, torch.zeros_like(x)))


def filter_matrix(
    start: Tensor, extent: Tensor, source: int, out: int, interpolation: Interpolation
) -> Tensor:
    """Weights `(B, out, source)` that resample [start, start + extent) to `out` pixels.

    start, extent: (B,) in source pixels. Weights outside the box are zero, as cropping before
    resizing makes them; each row sums to 1.
    """
    scale = extent / out  # (B,)
    support = scale.clamp(min=1.0)
    steps = torch.arange(out, device=start.device, dtype=torch.float32) + 0.5
    centers = start[:, None] + steps[None] * scale[:, None]  # (B, out)
    pixels = torch.arange(source, device=start.device, dtype=torch.float32) + 0.5
    distance = (pixels[None, None] - centers[..., None]) / support[:, None, None]
    weights = _kernel(distance, interpolation)
    inside = (pixels[None] > start[:, None]) & (pixels[None] < (start + extent)[:, None])
    weights = weights * inside[:, None]
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-8)


def crop_resize(
    images: Tensor, boxes: Tensor, size: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    """Crop `boxes (B, 4)` (top, left, height, width in pixels) and resize to `size`.

    images: (B, C, H, W) float. Returns (B, C, *size), clamped to 0..1 (bicubic overshoots).
    """
    top, left, height, width = boxes.to(torch.float32).unbind(1)
    rows = filter_matrix(top, height, images.shape[2], size[0], interpolation)
    columns = filter_matrix(left, width, images.shape[3], size[1], interpolation)
    rows, columns = rows.to(images.dtype), columns.to(images.dtype)
    out = rows[:, None] @ images @ columns.transpose(1, 2)[:, None]
    return out.clamp(0.0, 1.0) if interpolation is Interpolation.bicubic else out


def resize(images: Tensor, side: int) -> Tensor:
    """Whole square images `(B, C, H, H)` to `side`, bicubic; untouched when they have it."""
    if images.shape[-1] == side:
        return images
    extent = torch.tensor([0.0, 0.0, *images.shape[-2:]], device=images.device)
    return crop_resize(images, extent.expand(len(images), 4), (side, side), Interpolation.bicubic)


def resize_tokens(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Tokens of a grid on a square one, bilinear and antialiased, one filter for all.

    tokens: (B, h*w, D), row-major over `grid`, (h, w). Returns (B, side*side, D), bit for bit the
    same where the grid has that size. A matrix product, because torch's own antialiased resizing
    knows no bf16 on a CPU.
    """
    sides = []
    for source in grid:
        start = torch.zeros(1, device=tokens.device)
        rows = filter_matrix(start, start + source, source, side, Interpolation.bilinear)
        sides.append(rows[0])
    weights = torch.kron(*sides)  # (side*side, h*w)
    return weights.to(tokens.dtype) @ tokens
