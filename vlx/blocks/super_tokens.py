"""Super token attention: attention among pooled tokens, spread back over all (Huang et al., 2023).

B batch, C channels, H x W a map of tokens, m = hh * ww super tokens on a coarse grid, s tokens of
one cell; each token belongs, softly, to the 3x3 super tokens around its cell.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import fold, pad, scaled_dot_product_attention, unfold


class MapAttention(nn.Module):
    """Multi-head attention among all positions of a map (B, C, H, W).

    The joint projection's channels lie by head, (heads, 3, C / heads), as in the official weights.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        joint = self.qkv(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, 3 C)
        q, k, v = joint.unflatten(2, (self.heads, 3, -1)).transpose(1, 2).unbind(3)  # (B, n, N, d)
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, C)
        return self.proj(out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))


class SuperTokenAttention(nn.Module):
    """Pool a map to super tokens, let these attend to each other, spread the result back.

    size: rows and columns of tokens in the cell of one super token; 1 is plain attention.
    """

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.attention = MapAttention(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same; a map that is no multiple of `size` is padded with zeros."""
        if self.size == 1:
            return self.attention(x)
        height, width = x.shape[-2:]
        tokens, shares, grid = self.assign(x)
        attended = self.attention(super_tokens(tokens, shares, grid))
        spread = shares.transpose(2, 3) @ around(attended)  # (B, m, s, C)
        return to_map(spread, grid, self.size)[..., :height, :width]

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """A map (B, C, H, W), padded, as tokens by cell (B, m, s, C), with their shares in the nine
        super tokens around (B, m, 9, s) and the grid of cells (hh, ww)."""
        right, below = -x.shape[3] % self.size, -x.shape[2] % self.size
        if right or below:  # padding by nothing would copy the map
            x = pad(x, (0, right, 0, below))
        grid = (x.shape[2] // self.size, x.shape[3] // self.size)
        tokens = to_cells(x, self.size)
        with torch.no_grad():  # the official code: nothing learns through the association
            means = tokens.mean(2).transpose(1, 2).unflatten(2, grid)  # (B, C, hh, ww)
            shares = associate(tokens, means)
        return tokens, shares, grid

    def owners(self, x: Tensor) -> Tensor:
        """(B, H * W) int64: the super token in which each token of a map (B, C, H, W) has its
        largest share, numbered row-major; -1 where that is past the border."""
        _, shares, grid = self.assign(x)
        numbers = torch.arange(1, grid[0] * grid[1] + 1, dtype=torch.float32, device=x.device)
        names = around(numbers.view(1, 1, *grid))[..., 0].long() - 1  # (1, m, 9)
        owner = names.expand(len(x), -1, -1).gather(2, shares.argmax(2))  # (B, m, s)
        on_map = to_map(owner.unsqueeze(-1), grid, self.size)[..., : x.shape[2], : x.shape[3]]
        return on_map.flatten(1)


def to_cells(x: Tensor, size: int) -> Tensor:
    """(B, C, hh * size, ww * size) as (B, hh * ww, size * size, C): tokens by cell."""
    rows = x.permute(0, 2, 3, 1).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # of (B, hh, size, ww, size, C)


def to_map(tokens: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """The inverse of `to_cells`; grid: (hh, ww)."""
    cells = tokens.unflatten(2, (size, size)).unflatten(1, grid)  # (B, hh, ww, size, size, C)
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def around(supers: Tensor) -> Tensor:
    """(B, C, hh, ww) as (B, m, 9, C): the 3x3 super tokens around each, zeros past the border."""
    return unfold(supers, 3, padding=1).unflatten(1, (-1, 9)).permute(0, 3, 2, 1)


def gather_around(parts: Tensor, grid: tuple[int, int]) -> Tensor:
    """The transpose of `around`: each cell's nine parts (B, m, 9, C), added where they belong.

    What falls past the border is lost. Returns (B, C, hh, ww).
    """
    return fold(parts.permute(0, 3, 2, 1).flatten(1, 2), grid, 3, padding=1)


def associate(tokens: Tensor, supers: Tensor) -> Tensor:
    """The share of each token (B, m, s, C) in the nine super tokens around it: (B, m, 9, s).

    supers: (B, C, hh, ww). A neighbour past the border has the logit 0, not minus infinity, so it
    takes a share too. The nine come before the many: products and softmax of nine columns are
    several times slower than of nine rows on a CPU.
    """
    logits = around(supers) @ tokens.transpose(2, 3) * tokens.shape[-1] ** -0.5
    return logits.softmax(2)


def super_tokens(tokens: Tensor, shares: Tensor, grid: tuple[int, int]) -> Tensor:
    """Means (B, C, hh, ww) of tokens (B, m, s, C), weighted by their shares (B, m, 9, s)."""
    sums = gather_around(shares @ tokens, grid)
    weights = gather_around(shares.sum(3, keepdim=True), grid)  # (B, 1, hh, ww)
    return sums / (weights + 1e-12)
