"""SWAD's rule on loss curves made by hand."""

from __future__ import annotations

import pytest
import torch

from vlx.blocks.swad import LossValley, RunningMean


def test_identical_sets_change_nothing() -> None:
    state = {"weight": torch.randn(5, 3), "steps": torch.tensor(7)}
    mean = RunningMean()
    for _ in range(9):
        mean.add(state)
    assert all(torch.equal(mean.state[name], state[name]) for name in state)
    averaged = LossValley().average([state] * 9, [1.0] * 9)
    assert all(torch.equal(averaged[name], state[name]) for name in state)


def test_the_mean_is_that_of_all_and_leaves_its_inputs_alone() -> None:
    sets = [{"w": torch.full((2,), float(v))} for v in (1, 2, 6)]
    mean = RunningMean()
    for state in sets:
        mean.add(state)
    torch.testing.assert_close(mean.state["w"], torch.full((2,), 3.0))
    assert sets[0]["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # 0.5 is the first that two later ones do not undercut; the threshold is 1.3 * 0.55 = 0.715,
        # and the last windows are short.
        ([1.0, 0.7, 0.5, 0.55, 0.6, 0.52, 0.7], range(2, 7)),
        # A peak is bridged by a lower loss within six evaluations.
        ([0.5, 0.5, 0.5, 2.0, 2.0, 2.0, 2.0, 2.0, 0.6], range(9)),
        # From place 3 on six evaluations lie above 0.65: the rest is no part, low or not.
        ([0.5, 0.5, 0.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.5], range(3)),
        # Still falling: the newest alone.
        ([1.0, 0.9, 0.8, 0.7], range(3, 4)),
        ([1.0, 2.0], range(1, 2)),
    ],
)
def test_where_the_valley_begins_and_ends(losses: list[float], expected: range) -> None:
    assert LossValley().segments(losses) == expected


def test_the_average_is_that_of_the_valleys_segments() -> None:
    segments = [{"w": torch.tensor(float(v))} for v in (9, 9, 1, 2, 3)]
    averaged = LossValley().average(segments, [1.0, 0.9, 0.5, 0.5, 0.5])
    assert averaged["w"] == 2
