"""Collectives that do nothing in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the run; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over processes; detached. A copy even in a single process."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather_rows(x: Tensor) -> Tensor:
    """Rows of every process, (W * B, ...) in the order of the processes, from this one's (B, ...).

    With gradient: what every process's loss says of a row is summed at the row's own process. A
    mean over local rows then gives, after gradients are averaged, the mean over all.
    """
    return x if world_size() == 1 else _Gather.apply(x)  # type: ignore[return-value]


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """`total / count` of the global batch, such that averaging gradients over processes is exact.

    total: local sum with gradient; count: local number of terms. Returns a scalar whose mean over
    the processes is (sum of totals) / (sum of counts).
    """
    return total * world_size() / all_reduce_sum(count).clamp(min=1)


def any_process(flag: bool, device: torch.device) -> bool:
    """True on every process when it is True on one."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
