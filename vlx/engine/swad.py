"""Stochastic weight averaging, densely, over the valley of a validation loss (SWAD, Cha et al.,
NeurIPS 2021).

A segment is the stretch between two evaluations; every step of it adds the weights to the segment's
running mean. The losses found at the segments' ends decide which of the means are averaged again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlx.engine.config import TrainConfig
from vlx.engine.ema import Ema, averaged_tensors


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
    """Which segments lie in the valley.

    `losses` are those of the weights at every segment's end, on held-out data, in order; 0 or more,
    as a cross-entropy is: the threshold is a multiple of them.
    """

    converge: int = 3
    """Evaluations of which the first must be the lowest, for the valley to begin there."""
    tolerance: int = 6
    """Evaluations over whose minimum the loss is smoothed."""
    ratio: float = 0.3
    """The valley ends where the smoothed loss exceeds its beginning's mean by this share."""

    def start(self, losses: Sequence[float]) -> int | None:
        """Where the valley begins, which later losses do not change; None: nothing converged."""
        for place in range(len(losses) - self.converge + 1):
            if losses[place] == min(losses[place : place + self.converge]):
                return place
        return None

    def segments(self, losses: Sequence[float]) -> range:
        """Places of the segments to average, if no loss followed. At least one loss.

        Where nothing converges, the last segment alone.
        """
        start = self.start(losses)
        if start is None:
            return range(len(losses) - 1, len(losses))
        threshold = (1 + self.ratio) * sum(losses[start : start + self.converge]) / self.converge
        stop = start
        while stop < len(losses) and min(losses[stop : stop + self.tolerance]) <= threshold:
            stop += 1
        return range(start, stop)

    def undecided(self, losses: Sequence[float]) -> range:
        """Places of the segments that later losses may bring in or leave out."""
        total, start = len(losses), self.start(losses)
        if start is None:
            return range(max(0, total - self.converge + 1), total)
        first = max(start, total - self.tolerance + 1)  # the first whose window is not full
        ended = self.segments(losses).stop < first
        return range(total, total) if ended else range(first, total)


class ValleyMean:
    """The mean of the valley's segments, each counted alike, while they still come.

    Holds that of the segments that are surely inside, and apart the at most
    max(converge, tolerance) - 1 that the rule has not decided on.
    """

    def __init__(self, rule: LossValley) -> None:
        self.rule = rule
        self.losses: list[float] = []
        self.inside = RunningMean()
        self.waiting: dict[int, dict[str, Tensor]] = {}

    def add(self, segment: dict[str, Tensor], loss: float) -> None:
        """segment: the mean weights of the newest one. It is kept, not copied."""
        self.waiting[len(self.losses)] = segment
        self.losses.append(loss)
        chosen, undecided = self.rule.segments(self.losses), self.rule.undecided(self.losses)
        for place in [place for place in self.waiting if place not in undecided]:
            decided = self.waiting.pop(place)
            if place in chosen:
                self.inside.add(decided)

    def mean(self) -> dict[str, Tensor]:
        """What is averaged if no segment follows; at least one came."""
        mean = copy.deepcopy(self.inside)
        chosen = self.rule.segments(self.losses)
        for place, segment in self.waiting.items():
            if place in chosen:
                mean.add(segment)
        return mean.state


class Swad:
    """Averages what is trained of a module over a run; closed segments lie on the host.

    Sharded parameters are not for this.
    """

    def __init__(self, module: nn.Module) -> None:
        self.tensors = averaged_tensors(module)
        self.segment = RunningMean()
        self.valley = ValleyMean(LossValley())

    def update(self) -> None:
        """Add the weights after a step."""
        self.segment.add(self.tensors)

    def close(self, loss: float) -> None:
        """End the segment with the validation loss of the present weights."""
        if not self.segment.count:  # every update of it was left out
            self.update()
        self.valley.add({name: mean.cpu() for name, mean in self.segment.state.items()}, loss)
        self.segment = RunningMean()

    @property
    def shadow(self) -> dict[str, Tensor]:
        """The average if the run ended now, on the host; nothing before the first evaluation."""
        return self.valley.mean() if self.valley.losses else {}

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, for evaluation."""
        average = self.shadow
        kept = {name: self.tensors[name].detach().clone() for name in average}
        self._put(average)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, state: Mapping[str, Tensor]) -> None:
        for name, value in state.items():
            self.tensors[name].copy_(value)

    def state(self) -> dict[str, Tensor]:
        """All that a resume needs, by names that `load` reads."""
        valley = self.valley
        sets = {"segment": self.segment.state, "inside": valley.inside.state}
        sets |= {str(place): segment for place, segment in valley.waiting.items()}
        return {
            "losses": torch.tensor(valley.losses, dtype=torch.float64),
            "counts": torch.tensor([self.segment.count, valley.inside.count]),
        } | {f"{key}/{name}": value for key, own in sets.items() for name, value in own.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        sets: dict[str, dict[str, Tensor]] = {"segment": {}, "inside": {}}
        for path, value in state.items():
            key, slash, name = path.partition("/")
            if slash:
                sets.setdefault(key, {})[name] = value
        self.valley.losses = state["losses"].tolist()
        self.segment.count, self.valley.inside.count = state["counts"].tolist()
        self.segment.state = {
            name: value.to(self.tensors[name].device) for name, value in sets.pop("segment").items()
        }
        self.valley.inside.state = sets.pop("inside")
        self.valley.waiting = {int(key): sets[key] for key in sorted(sets, key=int)}


def averaging(cfg: TrainConfig, module: nn.Module) -> Ema | Swad | None:
    """The average over training that the config asks for."""
    if cfg.swad is not None:
        return Swad(module)
    if cfg.ema_decay is None:
        return None
    share = 1.0 if cfg.ema_batch is None else cfg.batch_size / cfg.ema_batch
    return Ema(module, cfg.ema_decay**share)
