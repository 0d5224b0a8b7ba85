"""Accuracy with some of the channels."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vlx.core.capability import ChannelSubsets
from vlx.data.config import DataConfig
from vlx.evals.base import EvalData, Subject
from vlx.evals.channels import ChannelAccuracy
from vlx.evals.config import EvalConfig


class Reds(ChannelSubsets):
    """Right when it may use channel 0, and says class 0 otherwise."""

    num_channels = 3

    def __init__(self, labels: Tensor) -> None:
        self.labels, self.place = labels, 0

    def subset_logits(self, images: Tensor, channels: Sequence[int]) -> Tensor:
        rows = torch.arange(len(images)) + self.place
        self.place = (self.place + len(images)) % len(self.labels)
        labels = self.labels[rows] if 0 in channels else torch.zeros_like(rows)
        return torch.nn.functional.one_hot(labels, 10).float()


def test_channel_accuracy_is_the_mean_over_subsets_of_each_size() -> None:
    data = EvalData(DataConfig(workers=0), EvalConfig(), image_size=8, device=torch.device("cpu"))
    labels = torch.cat([batch["label"] for batch in data.pipeline("test").batches()]).cpu()
    found = ChannelAccuracy().run(Subject("reds", (Reds(labels),)), data)
    low = float((labels == 0).double().mean())
    assert found.metrics["3-of-3/top1"] == 1.0
    assert found.metrics["only-0+2/top1"] == 1.0
    assert found.metrics["only-1/top1"] == pytest.approx(low)
    assert found.metrics["2-of-3/top1"] == pytest.approx((2 + low) / 3)
    assert found.metrics["1-of-3/top1"] == pytest.approx((1 + 2 * low) / 3)
    assert found.metrics["mean/top1"] == pytest.approx((4 + 3 * low) / 7)
    assert found.num_samples == len(labels)
