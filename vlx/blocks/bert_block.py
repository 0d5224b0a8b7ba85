"""BERT's post-norm block (Devlin et al. 2019), and one that also looks at an image (ALBEF, Li et
al. 2021).

B texts of L tokens of width D; R images of M tokens of width V.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class AddNorm(nn.Module):
    """A linear map, dropout, the residual, then LayerNorm: how every part of a block ends."""

    def __init__(self, in_dim: int, dim: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x: (..., in_dim), residual: (..., dim). Returns (..., dim)."""
        return self.norm(residual + self.dropout(self.dense(x)))


class BertBlock(nn.Module):
    """Self-attention, then an MLP. dropout: of attention weights and of what is added."""

    def __init__(
        self, dim: int, heads: int, mlp_dim: int, *, dropout: float = 0.1, eps: float = 1e-12
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attended = AddNorm(dim, dim, dropout, eps)
        self.fc = nn.Linear(dim, mlp_dim)
        self.mixed = AddNorm(mlp_dim, dim, dropout, eps)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x: (B, L, D); real: (B, L) bool, False at padding, which no token sees."""
        return self.mix(self.attend(x, real))

    def attend(self, x: Tensor, real: Tensor) -> Tensor:
        found = self._attention(self.qkv(x).chunk(3, dim=-1), real[:, None, None])
        return self.attended(found, x)

    def mix(self, x: Tensor) -> Tensor:
        return self.mixed(gelu(self.fc(x)), x)

    def _attention(self, parts: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """Queries (B, L, D), keys and values (B, M, D). Returns (B, L, D)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return found.transpose(1, 2).flatten(2)


class FusionBlock(BertBlock):
    """A BERT block that looks at an image between self-attention and MLP."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        *,
        image_dim: int,
        dropout: float = 0.1,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(dim, heads, mlp_dim, dropout=dropout, eps=eps)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(image_dim, 2 * dim)
        self.looked = AddNorm(dim, dim, dropout, eps)

    def forward(  # type: ignore[override]
        self, x: Tensor, real: Tensor, image: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """x: (B, L, D); real: (B, L); image: (R, M, V) tokens.

        rows: (B,) which image each text looks at, where several look at one: its keys and values
        are then made once. None: text i looks at image i.
        """
        x = self.attend(x, real)
        key_value = self.key_value(image)  # (R, M, 2D)
        if rows is not None:
            key_value = key_value[rows]
        found = self._attention((self.query(x), *key_value.chunk(2, dim=-1)), None)
        return self.mix(self.looked(found, x))
