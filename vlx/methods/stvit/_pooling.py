"""Where semantic tokens start: the maximum of each bin of a grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def max_pool_grid(maps: Tensor, side: int) -> Tensor:
    """Maps (B, h, w, D) to (B, side, side, D) by adaptive max pooling.

    torch's own has no deterministic backward on a GPU and wants channels first. Bin i of n places
    is [floor(i n / side), ceil((i + 1) n / side)): bins overlap where side does not divide n.
    """
    for axis in (1, 2):
        length = maps.shape[axis]
        bins = []
        for i in range(side):
            first, end = i * length // side, -(-(i + 1) * length // side)
            bins.append(maps.narrow(axis, first, end - first).amax(axis))
        maps = torch.stack(bins, dim=axis)
    return maps


def settings(**names: str) -> dict[str, Any]:
    """timm's description of weights that nobody has published in its form."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        **names,
    }
