"""The decoder of siamese masked autoencoders: queries of one view, memory of the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu

from vlx.blocks.mim_decoder import PatchDecoder


class CrossBlock(nn.Module):
    """Cross-attention, MLP, self-attention, in this order, each normalised after its residual.

    torch's `TransformerDecoderLayer` has another order and cannot stand in. The MLP's width and
    the dropout do not depend on `dim` (CropMAE's code).
    """

    def __init__(self, dim: int, heads: int, *, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6)
        self.norm_self = nn.LayerNorm(dim, eps=1e-6)
        self.drop = nn.Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """queries (B, M, D), memory (B, N, D). Returns the new queries; memory is not updated."""
        attended = self.cross_attn(queries, memory, memory, need_weights=False)[0]
        x = self.norm_cross(queries + self.drop(attended))
        x = self.norm_mlp(x + self.drop(self.fc2(self.drop(gelu(self.fc1(x))))))
        attended = self.self_attn(x, x, x, need_weights=False)[0]
        return self.norm_self(x + self.drop(attended))


class CrossDecoder(PatchDecoder):
    """Repaints a masked view from its visible tokens and the whole tokens of another view."""

    def __init__(
        self, *, dim: int, heads: int, mlp_dim: int = 2048, dropout: float = 0.1, **sizes: Any
    ) -> None:
        """sizes: the other ones of `PatchDecoder`."""
        super().__init__(
            dim=dim,
            make_block=lambda: CrossBlock(dim, heads, mlp_dim=mlp_dim, dropout=dropout),
            **sizes,
        )

    def forward(self, memory: Tensor, prefix: Tensor, visible: Tensor, restore: Tensor) -> Tensor:
        """Predicted patches (B, N, patch_values) of the masked view.

        memory: (B, 1 + N, D) encoded tokens of the other view, class token included; they get no
        position here. prefix (B, 1, D), visible (B, K, D), restore (B, N): of the masked view.
        """
        memory = self.tokens.embed(memory)  # one projection for both views
        x = self.tokens(prefix, visible, restore)  # (B, 1 + N, dim)
        for block in self.blocks:
            x = block(x, memory)
        return self.to_pixels(x)
