"""An exponential moving average of the trainable weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Shadow copies by parameter name; sharded parameters keep sharded shadows."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.shadow: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.params.items()}

    @torch.no_grad()
    def update(self) -> None:
        """shadow = decay * shadow + (1 - decay) * weights."""
        shadow, params = list(self.shadow.values()), list(self.params.values())
        torch._foreach_lerp_(shadow, params, 1 - self.decay)  # pyright: ignore

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore shadows saved as full tensors."""
        for name, value in state.items():
            copy_full(self.shadow[name], value)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, for evaluation."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, param in self.params.items():
            kept = param.detach().clone()
            param.copy_(self.shadow[name])
            self.shadow[name].copy_(kept)


def copy_full(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a plain or a sharded (DTensor) one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(device=target.device, dtype=target.dtype)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)
