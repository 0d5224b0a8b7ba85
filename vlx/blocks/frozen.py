"""Modules that are used and never trained."""

from __future__ import annotations

from torch import nn


class Frozen(nn.Module):
    """Holds a module without gradients that stays in eval mode whatever is around it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)
