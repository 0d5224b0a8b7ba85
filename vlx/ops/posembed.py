"""Position tables."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """`(M,)` positions to `(M, dim)`: all sines, then all cosines, base 10000."""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.to(torch.float64)[:, None] * omega[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(grid: tuple[int, int], dim: int, num_prefix: int = 0) -> Tensor:
    """MAE's fixed table `(num_prefix + h*w, dim)` float32; prefix rows are zero.

    The first half of the width encodes the column, the second the row.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, got {dim}")
    h, w = grid
    rows = torch.arange(h).repeat_interleave(w)
    columns = torch.arange(w).repeat(h)
    table = torch.cat([sincos_1d(columns, dim // 2), sincos_1d(rows, dim // 2)], dim=1)
    return torch.cat([torch.zeros(num_prefix, dim), table.to(torch.float32)])
