"""The decoder of siamese masked autoencoders: queries of one view, memory of the other."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu

from vlx.blocks.init import xavier_init
from vlx.blocks.mim_decoder import MaskTokens


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


class CrossDecoder(nn.Module):
    """Repaints a masked view from its visible tokens and the whole tokens of another view."""

    def __init__(
        self,
        *,
        encoder_dim: int,
        grid: tuple[int, int],
        patch_values: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokens = MaskTokens(encoder_dim, dim, grid)
        self.blocks = nn.ModuleList(
            CrossBlock(dim, heads, mlp_dim=mlp_dim, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, patch_values)
        xavier_init(self)

    def forward(self, memory: Tensor, prefix: Tensor, visible: Tensor, restore: Tensor) -> Tensor:
        """Predicted patches (B, N, patch_values) of the masked view.

        memory: (B, 1 + N, D) encoded tokens of the other view, class token included; they get no
        position here. prefix (B, 1, D), visible (B, K, D), restore (B, N): of the masked view.
        """
        memory = self.tokens.embed(memory)  # one projection for both views
        x = self.tokens(prefix, visible, restore)  # (B, 1 + N, dim)
        for block in self.blocks:
            x = block(x, memory)
        return self.head(self.norm(x))[:, 1:]
