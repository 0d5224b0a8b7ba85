"""Modules that are used and never trained."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Frozen(nn.Module, Generic[M]):
    """Holds a module without gradients that stays in eval mode whatever is around it."""

    def __init__(self, module: M) -> None:
        super().__init__()
        self.module: M = module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Frozen[M]:
        return super().train(False)
