"""What some papers do to gradients before the update."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def clip_each(params: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale each tensor's gradient down to `max_norm` on its own (DINO's and GMML's code)."""
    for param in params:
        if param.grad is not None:
            norm = torch.linalg.vector_norm(param.grad)
            param.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
