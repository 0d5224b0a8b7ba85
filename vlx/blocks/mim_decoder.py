"""The light decoders of masked autoencoders: what they share, and MAE's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vlx.blocks.init import xavier_init
from vlx.blocks.vit_block import SplitAttention
from vlx.ops.posembed import sincos_2d
from vlx.ops.tokens import gather_tokens


class MaskTokens(nn.Module):
    """Projects encoded tokens and puts a learned token at every hidden place (MAE, sec. 3)."""

    def __init__(
        self, encoder_dim: int, dim: int, grid: tuple[int, int], num_prefix: int = 1
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = sincos_2d(grid, dim, num_prefix)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, prefix: Tensor, visible: Tensor, restore: Tensor) -> Tensor:
        """prefix (B, P, D), visible (B, K, D), restore (B, N). Returns (B, P + N, dim)."""
        cls, visible = self.embed(torch.cat([prefix, visible], 1)).split(
            [prefix.shape[1], visible.shape[1]], dim=1
        )
        batch, num_hidden = restore.shape[0], restore.shape[1] - visible.shape[1]
        hidden = self.mask_token.to(visible.dtype).expand(batch, num_hidden, -1)
        tokens = gather_tokens(torch.cat([visible, hidden], dim=1), restore)  # (B, N, dim)
        return torch.cat([cls, tokens], dim=1) + self.pos_embed


class PatchDecoder(nn.Module):
    """Tokens at every place, blocks over them, then pixels of every patch; subclasses say what
    block, and what it reads."""

    def __init__(
        self,
        *,
        encoder_dim: int,
        grid: tuple[int, int],
        patch_values: int,
        dim: int,
        depth: int,
        make_block: Callable[[], nn.Module],
        num_prefix: int = 1,
    ) -> None:
        super().__init__()
        self.num_prefix = num_prefix
        self.tokens = MaskTokens(encoder_dim, dim, grid, num_prefix)
        self.blocks = nn.ModuleList(make_block() for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, patch_values)
        xavier_init(self)

    def to_pixels(self, x: Tensor) -> Tensor:
        """(B, P + N, dim) after the last block. Returns (B, N, patch_values)."""
        return self.head(self.norm(x))[:, self.num_prefix :]


class MAEDecoder(PatchDecoder):
    """Self-attention over visible and mask tokens."""

    def __init__(self, *, dim: int, heads: int, **sizes: Any) -> None:
        """sizes: the other ones of `PatchDecoder`."""
        super().__init__(
            dim=dim,
            make_block=lambda: Block(dim, heads, qkv_bias=True, attn_layer=SplitAttention),
            **sizes,
        )

    def forward(self, prefix: Tensor, visible: Tensor, restore: Tensor) -> Tensor:
        """prefix (B, P, D), visible (B, K, D), restore (B, N). Returns (B, N, patch_values)."""
        x = self.tokens(prefix, visible, restore)  # (B, P + N, dim)
        for block in self.blocks:
            x = block(x)
        return self.to_pixels(x)
