"""Polyphase anchoring: what a shift changes, and what not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlx.core.errors import ConfigError
from vlx.ops.polyphase import polyphase_anchor


def maps(count: int = 3, side: int = 12, channels: int = 4) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def naive(x: Tensor, stride: int) -> Tensor:
    """Phase by phase, as the paper writes it."""
    out = []
    for image in x:
        norms = {
            (i, j): float(image[:, i::stride, j::stride].double().norm())
            for i in range(stride)
            for j in range(stride)
        }
        i, j = max(norms, key=lambda place: norms[place])
        out.append(image.roll((-i, -j), (1, 2)))
    return torch.stack(out)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6])
def test_the_largest_phase_comes_first(stride: int) -> None:
    assert torch.equal(polyphase_anchor(maps(), stride), naive(maps(), stride))


def test_it_is_idempotent_and_keeps_every_value() -> None:
    once = polyphase_anchor(maps(), 4)
    assert torch.equal(polyphase_anchor(once, 4), once)
    assert torch.equal(once.flatten(1).sort().values, maps().flatten(1).sort().values)


@pytest.mark.parametrize("shift", [(1, 0), (5, 3), (-2, 7), (4, 8)])
def test_a_strided_convolution_of_it_follows_any_circular_shift(shift: tuple[int, int]) -> None:
    conv = nn.Conv2d(4, 6, 4, 4).double()
    x = maps().double()
    plain = conv(polyphase_anchor(x, 4))
    moved = conv(polyphase_anchor(x.roll(shift, (2, 3)), 4))
    for one, other in zip(plain, moved):
        rolls = [one.roll((i, j), (1, 2)) for i in range(3) for j in range(3)]
        assert any(torch.allclose(roll, other, atol=1e-12) for roll in rolls)
    torch.testing.assert_close(plain.mean((2, 3)), moved.mean((2, 3)), atol=1e-12, rtol=0)
    bare = conv(x.roll(shift, (2, 3))).mean((2, 3))
    assert torch.allclose(conv(x).mean((2, 3)), bare) == all(step % 4 == 0 for step in shift)


def test_the_gradient_is_the_inverse_roll() -> None:
    x = maps().requires_grad_()
    weights = torch.randn_like(x)
    (polyphase_anchor(x, 3) * weights).sum().backward()
    for image in range(3):
        offset = next(
            (i, j)
            for i in range(3)
            for j in range(3)
            if torch.equal(x[image].roll((-i, -j), (1, 2)), polyphase_anchor(x, 3)[image])
        )
        assert torch.equal(x.grad[image], weights[image].roll(offset, (1, 2)))  # type: ignore[index]


def test_the_first_of_equal_phases_counts() -> None:
    x = torch.ones(2, 3, 8, 8)
    assert torch.equal(polyphase_anchor(x, 4), x)
    assert torch.equal(polyphase_anchor(torch.zeros_like(x), 4), torch.zeros_like(x))


def test_sides_that_the_stride_does_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="by 5 needs sides that it divides, got 12x12"):
        polyphase_anchor(maps(), 5)
