"""Teachers that follow their student by a moving average."""

from __future__ import annotations

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every parameter of a teacher to momentum * own + (1 - momentum) * student's; buffers
    stay. Both have the same parameters in the same order."""
    own, followed = list(teacher.parameters()), list(student.parameters())
    torch._foreach_lerp_(own, followed, 1 - momentum)  # pyright: ignore


def rising_momentum(start: float, step: int, total_steps: int) -> float:
    """A teacher's momentum at a step: from `start` to 1 by a half-cosine over the whole run (BYOL,
    Grill et al. 2020)."""
    return 1 - (1 - start) * (math.cos(math.pi * step / total_steps) + 1) / 2


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
        follow(self.module, student, self.momentum)
        for mine, theirs in zip(self.module.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)
