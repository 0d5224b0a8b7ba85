"""Windowed soft k-means of a grid of tokens, and the grid rebuilt from the clusters (Expedit,
Liang et al., 2022).

B batch, P patches on a grid of H rows and W columns, M clusters on h rows and w columns, both
row-major; D width of tokens, E width of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from vlx.ops.token_state import TokenState, scatter_back


@dataclass(frozen=True, kw_only=True)
class ClusteredState(TokenState):
    """Tokens that are centroids, with what rebuilds the grid from them."""

    affinity: Tensor
    """(B, P, M) float32: minus the squared distance of a patch and a centroid as they were at the
    clustering, times the inverse temperature, up to a constant of each patch."""


def windows(grid: tuple[int, int], clusters: tuple[int, int], window: int) -> Tensor:
    """(P, M) bool: clusters at most `window // 2` rows and columns from the patch's own cell.

    The cell is the grid of clusters enlarged to the grid of patches, nearest neighbour.
    """
    count = clusters[0] * clusters[1]
    numbers = torch.arange(count, dtype=torch.float32).view(1, 1, *clusters)
    cell = interpolate(numbers, size=grid, mode="nearest").flatten().long()[:, None]  # (P, 1)
    other = torch.arange(count)
    columns, reach = clusters[1], window // 2
    near_rows = (cell // columns - other // columns).abs() <= reach
    return near_rows & ((cell % columns - other % columns).abs() <= reach)


def minus_distances(patches: Tensor, centroids: Tensor) -> Tensor:
    """Minus the squared distances (B, P, M), plus the patches' own squared norms.

    These cancel in a softmax over clusters and in a choice of the nearest. patches: (B, P, D);
    centroids: (B, M, D).
    """
    squares = centroids.square().sum(-1).unsqueeze(1)  # (B, 1, M)
    return torch.baddbmm(squares, patches, centroids.transpose(1, 2), beta=-1, alpha=2)


def soft_copy(state: ClusteredState, values: Tensor, *, neighbours: int, norm: int) -> Tensor:
    """Values (B, M, E) on the patches (B, P, E): the nearest clusters' weighted sum.

    norm: the one of each patch's weights that is made 1; the first gives a weighted mean.
    """
    near = state.affinity.topk(min(neighbours, values.shape[1]), dim=-1)  # (B, P, k)
    # A softmax first: far from every cluster the plain exponentials are all 0.
    weights = normalize(near.values.softmax(-1), p=norm, dim=-1)
    spread = torch.zeros_like(state.affinity).scatter(-1, near.indices, weights)  # (B, P, M)
    return spread @ values


def hard_copy(state: ClusteredState, values: Tensor) -> Tensor:
    """Values (B, M, E) on the patches (B, P, E): each that of its nearest cluster."""
    return scatter_back(values, state.owner - state.num_prefix)


def enlarge(values: Tensor, clusters: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Values (B, M, E) on the patches (B, P, E), bilinear, whatever joined which cluster."""
    on_clusters = values.transpose(1, 2).unflatten(2, clusters)
    dense = interpolate(on_clusters, size=grid, mode="bilinear", align_corners=False)
    return dense.flatten(2).transpose(1, 2)
