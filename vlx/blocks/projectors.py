"""Small networks from one model's tokens into another's space."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu


class TokenProjector(nn.Module):
    """Per token: LayerNorm, dropout, then a linear map plus a two-layer MLP beside it.

    Maniparambil et al. (CVPR 2025), the official code: no norm after.
    """

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_dim, out_dim)
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., in_dim) to (..., out_dim)."""
        x = self.dropout(self.norm(tokens))
        return self.linear(x) + self.fc2(gelu(self.fc1(x)))


class ResidualHead(nn.Module):
    """A projection, then LayerNorm of itself plus what a GELU and a second layer make of it."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.project = nn.Linear(in_dim, out_dim)
        self.fc = nn.Linear(out_dim, out_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) to (..., out_dim)."""
        x = self.project(x)
        return self.norm(x + self.dropout(self.fc(gelu(x))))
