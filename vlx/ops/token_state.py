"""Tokens with the bookkeeping that lets fewer of them be traced back to the patches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlx.ops.tokens import gather_tokens


@dataclass(frozen=True)
class TokenState:
    """A sequence inside a ViT. B batch, N tokens now (prefix first), P patches of the image."""

    x: Tensor
    """(B, N, D)."""
    num_prefix: int
    """Class and register tokens, at the front; reducers leave them there."""
    owner: Tensor
    """(B, P) int64: the token that now stands for each patch, as an index into `x`; -1 is none."""
    size: Tensor | None = None
    """(B, N) how many patches each token stands for; None is one each."""
    fused: Tensor | None = None
    """(B, N) bool: tokens that sum up dropped patches; None is no such token."""

    @property
    def num_patches(self) -> int:
        """Tokens that are not prefix."""
        return self.x.shape[1] - self.num_prefix

    @property
    def kept(self) -> Tensor:
        """(B, P) bool: patches that a token of their own (or merged, not a fused one) carries."""
        held = self.owner >= 0
        if self.fused is None:
            return held
        return held & ~self.fused.gather(1, self.owner.clamp(min=0))

    def after_prefix(self, places: Tensor) -> Tensor:
        """`(B, prefix + K)`: the places of the prefix, then `places (B, K)` of other tokens."""
        prefix = torch.arange(self.num_prefix, device=places.device)
        return torch.cat([prefix.expand(len(places), -1), places], dim=1)

    def select(self, index: Tensor) -> TokenState:
        """Only the tokens at `index (B, K)`, in that order; patches of the others have no owner."""
        places = torch.arange(index.shape[1], device=index.device).expand_as(index)
        moved = index.new_full(self.x.shape[:2], -1).scatter(1, index, places)  # old to new place
        owner = moved.gather(1, self.owner.clamp(min=0)).where(self.owner >= 0, self.owner)
        return replace(
            self,
            x=gather_tokens(self.x, index),
            owner=owner,
            size=None if self.size is None else self.size.gather(1, index),
            fused=None if self.fused is None else self.fused.gather(1, index),
        )


def start(x: Tensor, num_prefix: int) -> TokenState:
    """The state of `x (B, P + prefix, D)` in which every patch is a token."""
    places = torch.arange(num_prefix, x.shape[1], device=x.device)
    return TokenState(x, num_prefix, owner=places.expand(x.shape[0], -1))


def scatter_back(values: Tensor, owner: Tensor) -> Tensor:
    """The dense grid: each patch gets the value of its token.

    values: (B, N, D); owner: (B, P) indices into N, -1 gives zeros. Returns (B, P, D).
    """
    dense = gather_tokens(values, owner.clamp(min=0))
    return dense * (owner >= 0).unsqueeze(-1).to(dense.dtype)


def random_tokens(state: TokenState, count: int) -> Tensor:
    """`(B, prefix + count)` places of the prefix and of `count` random other tokens, in order.

    Drawn from torch's generator, which the loop seeds before every step and evaluation.
    """
    noise = torch.rand(len(state.x), state.num_patches, device=state.x.device)
    chosen = noise.topk(count, dim=1).indices.sort(dim=1).values + state.num_prefix
    return state.after_prefix(chosen)
