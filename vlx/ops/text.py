"""Padded token sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def real_tokens(lengths: Tensor, count: int) -> Tensor:
    """(B, count) bool, True where a sequence of `lengths (B,)` has a token, False at padding."""
    return torch.arange(count, device=lengths.device) < lengths[:, None]


def mean_tokens(tokens: Tensor, real: Tensor) -> Tensor:
    """(B, L, D) and the mask of real tokens (B, L) to their mean (B, D)."""
    weights = real.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
