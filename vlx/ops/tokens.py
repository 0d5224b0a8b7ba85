"""Moving tokens about."""

from __future__ import annotations

from torch import Tensor


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of `tokens (B, N, D)` at `index (B, K)`. Returns (B, K, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def put_tokens(tokens: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """`tokens (B, N, D)` with its rows at `index (B, K)` exchanged for `values (B, K, D)`."""
    places = index.unsqueeze(-1).expand_as(values)
    return tokens.scatter(1, places, values.to(tokens.dtype))


def map_to_tokens(x: Tensor) -> Tensor:
    """A map (B, C, h, w) as tokens (B, h*w, C), row-major."""
    return x.flatten(2).transpose(1, 2)


def tokens_to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, h*w, C) as a map (B, C, h, w); `size` is (h, w)."""
    return tokens.transpose(1, 2).unflatten(2, size)
