"""The selective scan: its three ways give one result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlx.ops.selective_scan import scan_all, scan_chunks, scan_tokens, states_before

LENGTHS = (1, 5, 64, 70)


def inputs(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Decays as a model starts with, and stronger ones."""
    generator = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    dt = 0.2 * torch.rand(2, count, 3, generator=generator, dtype=dtype)
    rate = -1 - 15 * torch.rand(3, generator=generator, dtype=dtype)
    found = [normal(2, count, 3, 8), dt, rate, normal(2, count, 5), normal(2, count, 5)]
    return [part.requires_grad_() for part in found]


@pytest.mark.parametrize("count", LENGTHS)
@pytest.mark.parametrize("size", [None, 7, 64])
def test_all_at_once_and_in_chunks_are_the_recurrence_and_so_are_their_gradients(
    count: int, size: int | None
) -> None:
    given = inputs(count)
    expected = scan_tokens(*given)
    found = scan_all(*given) if size is None else scan_chunks(*given, size=size)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    back = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    exact = torch.autograd.grad(expected, given, back, allow_unused=True)
    for a, b in zip(torch.autograd.grad(found, given, back), exact, strict=True):
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5 * float(b.abs().max().clamp(min=1)))


def test_the_recurrence_is_the_formula_of_one_head() -> None:
    x, dt, rate, write, read = (part.detach() for part in inputs(4, torch.float64))
    found = scan_tokens(x, dt, rate, write, read)
    state = torch.zeros(8, 5, dtype=torch.float64)
    for t in range(4):
        fade = torch.exp(dt[1, t, 2] * rate[2])
        state = fade * state + dt[1, t, 2] * torch.outer(x[1, t, 2], write[1, t])
        torch.testing.assert_close(found[1, t, 2], state @ read[1, t])


def test_without_decay_it_is_causal_linear_attention() -> None:
    x, dt, _, write, read = (part.detach() for part in inputs(9, torch.float64))
    weights = (read @ write.transpose(1, 2)).tril()
    expected = torch.einsum("bnm,bmhp->bnhp", weights, dt[..., None] * x)
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(scan_chunks(x, dt, zero, write, read, size=4), expected)


@pytest.mark.parametrize("count", [1, 32, 33, 100, 1100])
def test_states_of_groups_of_groups_are_those_of_a_loop(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(1, count, 2, 3, 2, generator=generator, dtype=torch.float64)
    log_decay = -torch.rand(1, count, 2, generator=generator, dtype=torch.float64)
    found = states_before(written, log_decay)
    state = torch.zeros(1, 2, 3, 2, dtype=torch.float64)
    for k in range(count):
        torch.testing.assert_close(found[:, k], state)
        state = log_decay[:, k, :, None, None].exp() * state + written[:, k]


def test_chunks_stay_exact_over_thousands_of_tokens() -> None:
    given = [part.detach() for part in inputs(2500)]
    exact = scan_tokens(*(part.double() for part in given))
    found = scan_chunks(*given, size=64)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-5)


def test_strong_decays_give_neither_overflow_nor_nan() -> None:
    x, dt, rate, write, read = inputs(70)
    found = scan_chunks(x, dt * 1e4, rate, write, read, size=64)
    assert found.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.sum(), (x, dt, rate)))
