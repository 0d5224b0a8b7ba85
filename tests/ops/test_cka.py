"""Linear CKA: its definition, what it does not see and what it does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlx.ops.cka import linear_cka


def features(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def by_definition(x: Tensor, y: Tensor) -> Tensor:
    """<H XX^T H, H YY^T H> / (|H XX^T H| |H YY^T H|), the centring matrix written out."""
    count = len(x)
    centre = torch.eye(count, dtype=torch.float64) - 1 / count
    left = centre @ x.double() @ x.double().T @ centre
    right = centre @ y.double() @ y.double().T @ centre
    return (left * right).sum() / (left.norm() * right.norm())


@pytest.mark.parametrize(("count", "p", "q"), [(60, 8, 12), (10, 30, 20), (10, 4, 40)])
def test_both_ways_equal_the_definition(count: int, p: int, q: int) -> None:
    x, y = features(count, p, 0), features(count, q, 1)
    assert torch.allclose(linear_cka(x, y), by_definition(x, y), atol=1e-12)


@pytest.mark.parametrize(("count", "width"), [(60, 8), (10, 30)])
def test_rotation_scale_and_shift_change_nothing(count: int, width: int) -> None:
    x, y = features(count, width, 0), features(count, 12, 1)
    turn = torch.linalg.qr(features(width, width, 2).double()).Q
    moved = 3.5 * (x.double() @ turn) + features(1, width, 3)
    assert torch.allclose(linear_cka(x, x), torch.ones((), dtype=torch.float64))
    assert torch.allclose(linear_cka(x, moved), torch.ones((), dtype=torch.float64))
    assert torch.allclose(linear_cka(moved, y), linear_cka(x, y), atol=1e-12)
    assert torch.allclose(linear_cka(y, x), linear_cka(x, y), atol=1e-12)


def test_a_general_linear_map_changes_it() -> None:
    x = features(60, 8, 0)
    stretched = x * torch.logspace(0, 2, 8)
    assert linear_cka(x, stretched) < 0.6


def test_unrelated_features_of_many_samples_are_unlike() -> None:
    assert linear_cka(features(2000, 8, 0), features(2000, 8, 1)) < 0.02


def test_a_constant_side_has_no_similarity() -> None:
    assert torch.isnan(linear_cka(torch.ones(9, 3), features(9, 4, 0)))
