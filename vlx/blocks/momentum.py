"""Teachers that follow their student by a moving average."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class MomentumCopy(nn.Module, Generic[M]):
    """A copy of a module without gradients, whose weights follow: m * own + (1 - m) * student's.

    It trains and evaluates with what is around it: in training its dropout is active. A teacher
    that must not drop anything is told so by `blocks.frozen.Frozen` around it.
    """

    def __init__(self, student: M, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.module: M = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def update(self, student: M) -> None:
        """One step towards the student; buffers (batch statistics) are copied. Call it after the
        optimizer."""
        own, followed = list(self.module.parameters()), list(student.parameters())
        torch._foreach_lerp_(own, followed, 1 - self.momentum)  # pyright: ignore
        for mine, theirs in zip(self.module.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)
