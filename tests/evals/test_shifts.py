"""Consistency under shifts, against a count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlx.core.capability import ClassLogits
from vlx.data.config import DataConfig
from vlx.evals.base import EvalData, Subject
from vlx.evals.config import EvalConfig
from vlx.evals.shifts import LARGEST_SHIFT, ShiftConsistency, shifted


class Brightest(ClassLogits):
    """The column of the brightest pixel, which follows a shift; or the mean, which does not."""

    def __init__(self, invariant: bool) -> None:
        self.invariant = invariant

    def class_logits(self, images: Tensor) -> Tensor:
        if self.invariant:
            place = (images.mean((1, 2, 3)) * 1000).long() % 10
        else:
            place = images.sum((1, 2)).argmax(1) % 10
        return torch.nn.functional.one_hot(place, 10).float()


def data(batch_size: int) -> EvalData:
    cfg = EvalConfig(batch_size=batch_size)
    return EvalData(DataConfig(workers=0), cfg, image_size=8, device=torch.device("cpu"))


def test_what_does_not_see_shifts_is_consistent() -> None:
    found = ShiftConsistency().run(Subject("mean", (Brightest(True),)), data(64))
    assert found.metrics["consistency"] == 1.0
    assert found.metrics["top1"] == found.metrics["shifted/top1"] == found.metrics["worst/top1"]
    assert found.num_samples == 360


def test_counts_are_those_of_a_loop_over_images() -> None:
    model, source = Brightest(False), data(50)
    found = ShiftConsistency().run(Subject("brightest", (model,)), source)
    rows = []
    for number, batch in enumerate(source.pipeline("test").batches()):
        copies = [batch["image"], *shifted(batch["image"], number)]
        for i, label in enumerate(batch["label"].tolist()):
            said = [int(model.class_logits(copy[i : i + 1]).argmax()) for copy in copies]
            right = [what == label for what in said]
            rows.append([right[0], right[1], said[1] == said[2], all(right)])
    expected = torch.tensor(rows).double().mean(0).tolist()
    assert list(found.metrics.values()) == pytest.approx(expected)
    assert 0 < found.metrics["consistency"] < 1


def test_shifts_are_drawn_by_the_batch_and_reach_all_of_the_range() -> None:
    images = torch.arange(20 * 20).view(1, 1, 20, 20).float()
    first = [shifted(images, number) for number in range(200)]
    assert all(torch.equal(a, b) for a, b in zip(first[7], shifted(images, 7)))
    moved = {divmod(int((copy[0, 0] == 0).nonzero()[0] @ torch.tensor([20, 1])), 20)
             for copies in first for copy in copies}  # fmt: skip
    assert {row for row, _ in moved} == set(range(LARGEST_SHIFT))
    assert {column for _, column in moved} == set(range(LARGEST_SHIFT))
