"""Tensors that say they lie on a GPU and hold no values: torch's FakeTensorMode, on any machine.

Under the mode an operation of tensors of two devices raises, as on a GPU, and so does what needs a
value on the host (`.item()`, `.tolist()`, `nonzero`), which on a GPU waits for all that is queued.
Backward wants a real context and is not covered; nor are values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

DEVICE = torch.device("cuda:0")
HOST_READ = (DataDependentOutputException, DynamicOutputShapeException)


def on_device(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake of a tensor's shape, strides and dtype."""
    with mode:
        return torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=DEVICE
        )


def all_on_device(mode: FakeTensorMode, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: on_device(mode, tensor) for name, tensor in tensors.items()}


def move(mode: FakeTensorMode, module: nn.Module) -> None:
    """Put fakes in place of a module's parameters and buffers, as `module.to(DEVICE)` would.

    A tensor that the module holds otherwise stays what it is, on the CPU, and raises when used.
    """
    made: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for part in module.modules():
        for name, own in [*part._parameters.items(), *part._buffers.items()]:
            if own is None:
                continue
            if own not in made:
                made[own] = on_device(mode, own)
                if isinstance(own, nn.Parameter):
                    made[own] = nn.Parameter(made[own], requires_grad=own.requires_grad)
            setattr(part, name, made[own])
