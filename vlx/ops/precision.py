"""Arithmetic that must stay in float32 under mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """A context in which matrix products keep the type of their operands, on `like`'s device.

    The meta device, where a dry run counts, knows no autocast and needs none.
    """
    if not torch.amp.is_autocast_available(like.device.type):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
