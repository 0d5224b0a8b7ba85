"""An exponential moving average of the trainable weights and of what batch norms have seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Shadow copies by name; sharded parameters keep sharded shadows."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.params = averaged_tensors(module)
        self.num_params = sum(p.requires_grad for p in self.params.values())
        self.shadow: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.params.items()}

    @torch.no_grad()
    def update(self) -> None:
        """shadow = decay * shadow + (1 - decay) * weights."""
        shadow, params = list(self.shadow.values()), list(self.params.values())
        # Statistics are never sharded, and one call takes no mixture.
        for part in (slice(0, self.num_params), slice(self.num_params, None)):
            if params[part]:
                torch._foreach_lerp_(shadow[part], params[part], 1 - self.decay)  # pyright: ignore

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


def averaged_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What an average over training is of, by name: trained parameters first, then the running
    statistics of trained batch norms, as those of the newest weights do not fit averaged ones."""
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    return {**params, **running_statistics(module)}


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Means and variances of the batch norms that have something to train, by name."""
    found: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and any(
            param.requires_grad for param in part.parameters()
        ):
            for key in ("running_mean", "running_var"):
                found[f"{name}.{key}"] = getattr(part, key)
    return {name: value for name, value in found.items() if value is not None}


def copy_full(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a plain or a sharded (DTensor) one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(device=target.device, dtype=target.dtype)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)
