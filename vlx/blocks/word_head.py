"""The head that predicts masked words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear


class WordHead(nn.Module):
    """Linear, GELU, LayerNorm, then the token table as the decoder (Devlin et al. 2019)."""

    def __init__(self, dim: int, vocab_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        """tokens: (..., D); table: (V, D), the weights of the token table. Returns (..., V)."""
        return linear(self.norm(gelu(self.dense(tokens))), table, self.bias)
