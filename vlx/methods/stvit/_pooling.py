"""Where semantic tokens start: the maximum of each bin of a grid."""

from __future__ import annotations

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
