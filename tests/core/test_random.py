"""Counter-based draws: statistics, and rows that do not depend on what is drawn with them."""

from __future__ import annotations

import math

import pytest
import torch

from vlx.core import random

KEYS = random.key(torch.arange(20_000), 1, "test")


def test_splitmix_constants_give_the_published_sequence() -> None:
    """First outputs of SplitMix64 from state 0 (Vigna's splitmix64.c)."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = torch.arange(3) * (0x9E3779B97F4A7C15 - (1 << 64))
    assert [int(x) & ((1 << 64) - 1) for x in random.mix(states)] == published


def test_keys_of_salts_equal_the_tensor_form() -> None:
    ids = torch.tensor([0, 1, 2**40, -5])
    for salt in (0, 1, 2**31, -3, 2**62):
        expected = random.mix(ids + random.mix(torch.tensor(salt)))
        assert torch.equal(random.key(ids, salt), expected)


def test_known_draws_stay_what_they_were() -> None:
    """Resumed runs, masks and results depend on them."""
    drawn = random.uniform(random.key(torch.tensor([0, 1]), 0, 0, "image"), 2)
    torch.testing.assert_close(
        drawn, torch.tensor([[0.53968972, 0.38280547], [0.66077405, 0.84756315]]), rtol=0, atol=1e-7
    )


def test_uniform_is_in_the_half_open_interval_with_the_right_moments() -> None:
    u = random.uniform(KEYS, 8).double()
    n = u.numel()
    assert u.min() >= 0
    assert u.max() < 1
    # Five standard errors of the mean and of the variance of a uniform.
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / n)


def test_uniform_fills_all_bins_alike() -> None:
    u = random.uniform(KEYS, 8).flatten()
    counts = torch.histc(u, bins=100, min=0, max=1)
    expected = u.numel() / 100
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 99 + 5 * math.sqrt(2 * 99)


def test_normal_has_the_right_moments_and_is_finite() -> None:
    z = random.normal(KEYS, 7).double()
    n = z.numel()
    assert torch.isfinite(z).all()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert abs((z.abs() < 1.0).double().mean() - 0.6827) < 5 * math.sqrt(0.22 / n)


@pytest.mark.parametrize("draw", [random.uniform, random.normal])
def test_columns_and_neighbouring_rows_are_uncorrelated(draw) -> None:
    x = draw(KEYS, 6).double()
    limit = 5 / math.sqrt(len(x))
    between = torch.corrcoef(x.T) - torch.eye(6)
    assert between.abs().max() < limit
    lagged = torch.corrcoef(torch.stack([x[1:, 0], x[:-1, 0]]))[0, 1]
    assert abs(lagged) < limit


@pytest.mark.parametrize("draw", [random.uniform, random.normal])
def test_a_row_is_the_same_under_any_split(draw) -> None:
    whole = draw(KEYS[:64], 5)
    for size in (1, 7, 32):
        parts = [draw(part, 5) for part in KEYS[:64].split(size)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(64)
    assert torch.equal(draw(KEYS[:64][order], 5), whole[order])


def test_a_uniform_column_does_not_depend_on_how_many_are_drawn() -> None:
    assert torch.equal(random.uniform(KEYS[:9], 3), random.uniform(KEYS[:9], 8)[:, :3])


def test_salts_give_independent_streams() -> None:
    ids = torch.arange(20_000)
    streams = [random.key(ids, *s) for s in ((0, 0), (0, 1), (1, 0), ("a",), ("b",), ("a", 0))]
    x = torch.stack([random.uniform(keys, 1)[:, 0] for keys in streams]).double()
    assert (torch.corrcoef(x) - torch.eye(len(streams))).abs().max() < 5 / math.sqrt(20_000)


def test_keys_do_not_collide() -> None:
    keys = torch.cat([random.key(torch.arange(50_000), seed, e) for seed in (0, 1) for e in (0, 1)])
    assert len(keys.unique()) == len(keys)


def test_ids_are_not_changed() -> None:
    ids = torch.arange(5)
    random.uniform(random.key(ids, 3, "x"), 2)
    assert torch.equal(ids, torch.arange(5))


def test_what_a_step_shares_is_the_same_on_every_process() -> None:
    from vlx.core.step import StepContext

    def draw(step: int, offset: int, stream: str = "grid") -> int:
        ctx = StepContext(step=step, total_steps=9, steps_per_epoch=3, seed=1, sample_offset=offset)
        return int(ctx.shared_generator(stream).integers(10**9))

    assert draw(4, 0) == draw(4, 64)
    assert len({draw(4, 0), draw(5, 0), draw(4, 0, "other")}) == 3
