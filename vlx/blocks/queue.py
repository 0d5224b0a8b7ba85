"""Ring buffers of what recent steps computed: negatives beyond the batch (MoCo, He et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlx.core.errors import ConfigError
from vlx.ops.dist import gather_rows, world_size


class RingQueue(nn.Module):
    """The newest columns of a stream. They and the place of the next one are in the state dict.

    columns: (D, Q), what it holds at the start.
    """

    columns: Tensor
    pointer: Tensor

    def __init__(self, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @property
    def size(self) -> int:
        return self.columns.shape[1]

    def check(self, rows: int) -> None:
        """Raise `ConfigError` unless `rows` a process, of all processes, divide the size."""
        count = rows * world_size()
        if self.size % count:
            raise ConfigError(
                f"method.queue_size={self.size} is no multiple of the {count} samples of a step: "
                f"use method.queue_size={max(1, self.size // count) * count}"
            )

    @torch.no_grad()
    def enqueue(self, rows: Tensor) -> None:
        """Replace the oldest columns by this step's `rows (B, D)` of every process."""
        self.check(len(rows))
        rows = gather_rows(rows.detach().to(self.columns.dtype))
        places = torch.arange(len(rows), device=rows.device) + self.pointer
        self.columns.index_copy_(1, places.remainder(self.size), rows.T)
        self.pointer.add_(len(rows)).remainder_(self.size)


class FeatureQueue(RingQueue):
    """A ring of `size` unit vectors of width `dim`, random ones at the start."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__(normalize(torch.randn(dim, size), dim=0))
