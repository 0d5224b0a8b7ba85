"""Choosing the next token."""

from __future__ import annotations

import pytest
import torch

from vlx.ops.decoding import Nucleus, greedy

CHANCES = torch.tensor([0.15, 0.5, 0.05, 0.3])


def draws(temperature: float, top_p: float, count: int = 20_000) -> torch.Tensor:
    """Share of each token among many draws."""
    sample = Nucleus(temperature, top_p, torch.Generator().manual_seed(0))
    found = sample(CHANCES.log().expand(count, -1))
    return torch.bincount(found, minlength=4) / count


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0, [1]), (0.4, [1]), (0.7, [1, 3]), (0.9, [0, 1, 3]), (1.0, [0, 1, 2, 3])],
)
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p: float, kept: list[int]) -> None:
    shares = draws(1.0, top_p)
    assert shares.nonzero().flatten().tolist() == kept
    expected = CHANCES[kept] / CHANCES[kept].sum()
    # 4 standard deviations of a share of 20,000 draws are below 0.015.
    assert torch.allclose(shares[kept], expected, atol=0.015)


def test_temperature_divides_the_logits() -> None:
    expected = (CHANCES.log() / 0.5).softmax(-1)
    assert torch.allclose(draws(0.5, 1.0), expected, atol=0.015)


def test_greedy_takes_the_likeliest() -> None:
    assert greedy(CHANCES.log()[None]).tolist() == [1]
