"""Padded token sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlx.ops.tokens import gather_tokens

_NO_TARGET = -100


def real_tokens(lengths: Tensor, count: int) -> Tensor:
    """(B, count) bool, True where a sequence of `lengths (B,)` has a token, False at padding."""
    return torch.arange(count, device=lengths.device) < lengths[:, None]


def mean_tokens(tokens: Tensor, real: Tensor) -> Tensor:
    """(B, L, D) and the mask of real tokens (B, L) to their mean (B, D)."""
    weights = real.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def pad_in_front(tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Real tokens moved to the end of each row, in their order: tokens (B, L, D), real (B, L)."""
    order = real.long().argsort(dim=1, stable=True)  # False sorts before True
    return gather_tokens(tokens, order), real.gather(1, order)


def caption_loss(
    logits: Tensor, ids: Tensor, lengths: Tensor, prefix: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a causal language model that reads `prefix` places and then a caption.

    logits: (B, prefix + T, V); ids: (B, T), padded behind; lengths: (B,) tokens of `ids` that are
    no padding. Each place predicts the next one. Places of the prefix are no targets, nor is
    padding; the end token is one, even where padding is the same id. Without a prefix the first
    token is no target, since nothing stands before it. Returns the sum and the number of targets.
    """
    targets = ids.masked_fill(~real_tokens(lengths, ids.shape[1]), _NO_TARGET)
    if prefix == 0:
        targets = targets[:, 1:]
    scores = logits[:, max(0, prefix - 1) : -1]  # (B, T or T - 1, V)
    total = cross_entropy(
        scores.flatten(0, 1).float(), targets.flatten(), ignore_index=_NO_TARGET, reduction="sum"
    )
    return total, (targets != _NO_TARGET).sum()
