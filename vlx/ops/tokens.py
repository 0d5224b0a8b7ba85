"""Moving tokens about."""

from __future__ import annotations

from torch import Tensor


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of `tokens (B, N, D)` at `index (B, K)`. Returns (B, K, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
