"""Stochastic weight averaging, densely, over the valley of a validation loss (SWAD, Cha et al.,
NeurIPS 2021), as VL2V-ADiP (2024) uses it.

A segment is the stretch between two evaluations; every step of it adds the weights to the segment's
running mean. The losses of the segments decide which of these means are averaged again.

Runs cannot use this until the training loop offers validation during training: until then they end
with their last weights, or with the moving average of `train.ema_decay`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class RunningMean:
    """The mean of weight sets, by name, that come one after the other; equal sets leave it exact.

    What is no floating-point number (counters) is taken from the newest set.
    """

    def __init__(self) -> None:
        self.count = 0
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, state: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name, value in state.items():
            if self.count == 1 or not value.is_floating_point():
                self.state[name] = value.detach().clone()
            else:
                mean = self.state[name]
                mean += (value - mean) / self.count


@dataclass(frozen=True)
class LossValley:
    """Which segments lie in the valley."""

    converge: int = 3
    """Evaluations of which the first must be the lowest, for the valley to begin there."""
    tolerance: int = 6
    """Evaluations over whose minimum the loss is smoothed."""
    ratio: float = 0.3
    """The valley ends where the smoothed loss exceeds its beginning's mean by this share."""

    def segments(self, losses: Sequence[float]) -> range:
        """Places of the segments to average.

        losses: of every segment's mean on held-out data, in order, at least one; 0 or more, as a
        cross-entropy is: the threshold is a multiple of it. Where nothing converges, the last
        segment alone.
        """
        starts = range(len(losses) - self.converge + 1)
        windows = [list(losses[i : i + self.converge]) for i in starts]
        start = next((i for i, window in enumerate(windows) if window[0] == min(window)), None)
        if start is None:
            return range(len(losses) - 1, len(losses))
        threshold = (1 + self.ratio) * sum(windows[start]) / self.converge
        stop = start
        while stop < len(losses) and min(losses[stop : stop + self.tolerance]) <= threshold:
            stop += 1
        return range(start, stop)

    def average(
        self, segments: Sequence[Mapping[str, Tensor]], losses: Sequence[float]
    ) -> dict[str, Tensor]:
        """The mean of the segments' means that lie in the valley, each counted alike."""
        mean = RunningMean()
        for place in self.segments(losses):
            mean.add(segments[place])
        return mean.state
