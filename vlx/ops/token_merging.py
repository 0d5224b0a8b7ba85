"""Bipartite soft matching and merging of tokens (ToMe, Bolya et al., 2023, section 3)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlx.ops.token_state import TokenState
from vlx.ops.tokens import gather_tokens


def num_merged(r: int, tokens: int, protected: int) -> int:
    """How many of `tokens` (prefix included) are merged away: at most half of the free ones."""
    return max(0, min(r, (tokens - protected) // 2))


def bipartite_matching(metric: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Every even-placed token's best partner among the odd-placed ones.

    metric: (B, N, d), compared by cosine. Returns, for the A = ceil(N / 2) even places, the best
    similarity (B, A), -inf for prefix tokens, and the partner's number among the odd places
    (B, A). No prefix token is a partner.
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # (B, A, N - A)
    scores[:, : (num_prefix + 1) // 2] = -torch.inf
    scores[:, :, : num_prefix // 2] = -torch.inf
    best, partner = scores.max(-1)
    return best, partner


def merge_pairs(state: TokenState, best: Tensor, partner: Tensor, r: int) -> TokenState:
    """Merge the r even-placed tokens of highest `best (B, A)` into their `partner (B, A)`.

    Values are averages weighted by size. Order after: the other even places by position, prefix
    among them first, then the odd places; with two prefix tokens and more, these come first.
    """
    x, prefix = state.x, state.num_prefix
    batch, tokens, _ = x.shape
    evens = best.shape[1]
    size = torch.ones(batch, tokens, device=x.device) if state.size is None else state.size
    order = best.argsort(dim=-1, descending=True, stable=True)
    sources, rest = order[:, :r], order[:, r:].sort(dim=-1).values
    target = partner.gather(1, sources)  # (B, r) among the odd places

    weighted = x * size.unsqueeze(-1).to(x.dtype)
    even, odd = weighted[:, ::2], weighted[:, 1::2]
    merged = odd.scatter_add(
        1, target.unsqueeze(-1).expand(-1, -1, x.shape[-1]), gather_tokens(even, sources)
    )
    merged_size = size[:, 1::2].scatter_add(1, target, size[:, ::2].gather(1, sources))
    new_x = torch.cat([gather_tokens(even, rest), merged], 1)
    new_size = torch.cat([size[:, ::2].gather(1, rest), merged_size], 1)
    new_x = new_x / new_size.unsqueeze(-1).to(x.dtype)

    # Where each old token has gone: evens that stay, evens that merged, odds.
    kept = torch.arange(evens - r, device=x.device).expand_as(rest)
    odds = torch.arange(tokens - evens, device=x.device) + (evens - r)
    even_place = rest.new_empty(batch, evens).scatter(1, rest, kept)
    even_place = even_place.scatter(1, sources, target + (evens - r))
    place = rest.new_empty(batch, tokens)
    place[:, ::2], place[:, 1::2] = even_place, odds
    if prefix > 1:
        new_x, new_size, place = _prefix_first(new_x, new_size, place, prefix)
    owner = place.gather(1, state.owner.clamp(min=0)).where(state.owner >= 0, state.owner)
    return replace(state, x=new_x, size=new_size, owner=owner)


def _prefix_first(
    x: Tensor, size: Tensor, place: Tensor, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring prefix tokens, which the split has spread over both halves, to the front in order."""
    key = torch.arange(x.shape[1], device=x.device).expand_as(size) + prefix
    ranks = torch.arange(prefix, device=x.device).expand(len(x), -1)
    order = key.scatter(1, place[:, :prefix], ranks).argsort(dim=1)  # new place to old
    return gather_tokens(x, order), size.gather(1, order), order.argsort(dim=1).gather(1, place)
