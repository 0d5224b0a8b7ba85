"""Distances between the places of a grid, in steps of the grid; places are row-major."""

from __future__ import annotations

import torch
from torch import Tensor


def line_distances(length: int, device: torch.device | None = None) -> Tensor:
    """|i - j| of the places of a line, (length, length) float32."""
    place = torch.arange(length, dtype=torch.float32, device=device)
    return (place[:, None] - place[None, :]).abs()


def manhattan_distances(size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """|row - row'| + |column - column'| on a grid of (h, w) = `size`, (h*w, h*w) float32."""
    rows, columns = _apart(size, device)
    return (rows + columns).flatten(0, 1).flatten(1)


def squared_distances(size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Squared Euclidean distance on a grid of (h, w) = `size`, (h*w, h*w) float32."""
    rows, columns = _apart(size, device)
    return (rows.square() + columns.square()).flatten(0, 1).flatten(1)


def _apart(size: tuple[int, int], device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Distances of rows (h, 1, h, 1) and of columns (1, w, 1, w)."""
    rows, columns = line_distances(size[0], device), line_distances(size[1], device)
    return rows[:, None, :, None], columns[None, :, None, :]
