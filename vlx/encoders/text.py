"""What every text encoder offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from vlx.blocks.vit_block import BlockHook


@dataclass(frozen=True)
class TextSpec:
    """Sizes that a method builds on."""

    dim: int
    depth: int
    heads: int
    vocab_size: int
    context_length: int


@dataclass
class TextOut:
    """Output tokens after the final norm, and the layers that were asked for."""

    tokens: Tensor
    """(B, L, D)."""
    pooled: Tensor
    """(B, D or `pooled_dim`): the encoder's own summary (end token, class token or mean of the
    real tokens)."""
    layers: dict[int, Tensor] = field(default_factory=dict)
    """Block number (1 = first) to its output (B, L, D), before the final norm."""


class TextEncoder(nn.Module):
    """Token ids to token vectors and one vector a text; padding never changes a result."""

    spec: TextSpec

    @property
    def token_table(self) -> nn.Embedding:
        """Ids to input vectors, before positions: prompts are put between its rows."""
        raise NotImplementedError

    @property
    def pooled_dim(self) -> int:
        """Width of `TextOut.pooled`: that of the tokens, unless the encoder projects it."""
        return self.spec.dim

    def layer_depths(self) -> dict[str, int]:
        """Parameter-name prefix to depth for layer-wise lr decay (`core.method.Layered`)."""
        return {}

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor,
        *,
        embeddings: Tensor | None = None,
        layers: Sequence[int] = (),
        hook: BlockHook | None = None,
    ) -> TextOut:
        """ids: (B, L) int64, padded behind; lengths: (B,) tokens that are no padding.

        embeddings: (B, L, D) in the place of the table's rows (learned prompts); `ids` then says
        nothing. layers: block numbers whose outputs to return. hook: acts inside the blocks, where
        the encoder has blocks of timm's kind; `UnsupportedBlock` elsewhere.
        """
        raise NotImplementedError
