"""Points inside boxes of an image, and boxes that move (Gao et al. 2023).

A box is (x0, y0, x1, y1) as shares of the image's sides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

_HIGHEST = 128.0  # frequency of the position encoding


def points_in_boxes(boxes: Tensor, offsets: Tensor) -> Tensor:
    """(B, T, P, 2) places, x first, as shares of the image's sides.

    boxes: (B, T, 4); offsets: (B, T, P, 2), which are brought to mean 0 and deviation 1/3 over the
    points of a box and then scale with its sides.
    """
    spread = offsets.std(2, keepdim=True) + 1e-5
    offsets = (offsets - offsets.mean(2, keepdim=True)) / (3 * spread)
    low, high = boxes.unsqueeze(2).chunk(2, dim=-1)  # each (B, T, 1, 2)
    return (low + high) / 2 + offsets * (high - low)


def sample_points(features: Tensor, points: Tensor) -> Tensor:
    """(B, T, P, C): a map (B, C, H, W) read at `points (B, T, P, 2)`, bilinear; outside the map its
    rim continues."""
    found = grid_sample(features, 2 * points - 1, padding_mode="border", align_corners=False)
    return found.permute(0, 2, 3, 1)


def moved_boxes(boxes: Tensor, change: Tensor) -> Tensor:
    """Boxes (B, T, 4) whose centres move by `change[..., :2]` of their sides, and whose sides grow
    by the exponential of `change[..., 2:]`."""
    low, high = boxes.chunk(2, dim=-1)
    side = (high - low).abs()
    centre, half = (low + high) / 2 + change[..., :2] * side, side * change[..., 2:].exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


@torch.no_grad()
def encode_boxes(boxes: Tensor, dim: int) -> Tensor:
    """Boxes (B, T, 4) as sines and cosines (B, T, dim), a quarter for each of the four numbers:
    sines of the even frequencies, then cosines of the odd ones."""
    steps = torch.linspace(0, math.log(_HIGHEST), dim // 4, device=boxes.device)
    angle = math.pi * boxes[..., None] * steps.exp()  # (B, T, 4, dim / 4)
    return torch.cat([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(2)


def grid_boxes(count: int, side: float = 0.5) -> Tensor:
    """(count, 4): as many boxes of `side` as fill a square grid over the image; the rest of them
    are the whole image."""
    root = int(count**0.5)
    step = torch.arange(root) / max(1, root - 1) * (1 - side)
    corner = torch.stack(torch.meshgrid(step, step, indexing="ij"), dim=-1).flatten(0, 1)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(count, 1)
    boxes[: root * root] = torch.cat([corner, corner + side], dim=1)
    return boxes
