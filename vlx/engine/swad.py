"""Stochastic weight averaging, densely, over the valley of a validation loss (SWAD, Cha et al.,
NeurIPS 2021).

A segment is the stretch between two evaluations; every step of it adds the weights to the segment's
running mean. The losses found at the segments' ends decide which of the means are averaged again,
as the authors' code decides it.
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
    """How often each segment counts in the average, as the authors' code has it.

    `losses` are those of the weights at every segment's end, on held-out data, in order; 0 or more,
    as a cross-entropy is: the threshold is a multiple of them. The valley begins at a loss that the
    `converge - 1` next ones do not undercut. The paper's algorithm averages from there on. The code
    (github.com/khanrc/swad, `LossValley`) looks back too, over the `tolerance - converge` segments
    before: after the last of them whose own loss is above the threshold it takes all but the first.
    From then on it takes the oldest of the last `tolerance` segments at every evaluation, once that
    is not before the beginning, which so counts twice; a valley that begins among the first
    evaluations has its beginning counted at each of them until there are `tolerance`.
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

    def counts(self, losses: Sequence[float]) -> list[int]:
        """How often each segment counts, if no loss followed. At least one loss.

        While the valley lasts, the newest segments are in it as far as their smoothed losses are
        below the threshold. Where nothing converges, the last segment alone.
        """
        start = self.start(losses)
        if start is None:
            return [0] * (len(losses) - 1) + [1]
        found, ended = self.settled(losses)
        if not ended:
            for place in range(self._oldest(len(losses)) + 1, len(losses)):
                if min(losses[place:]) > self._threshold(losses, start):
                    break
                found[place] += 1
        return found if any(found) else _only(start, len(losses))

    def settled(self, losses: Sequence[float]) -> tuple[list[int], bool]:
        """How often each segment counts so far, whatever follows, and whether the valley ended."""
        found, start = [0] * len(losses), self.start(losses)
        if start is None:
            return found, False
        threshold, shown = self._threshold(losses, start), start + self.converge
        for place in self._at_the_beginning(losses, start, threshold):
            found[place] += 1
        for seen in range(shown + 1, len(losses) + 1):
            oldest = self._oldest(seen)
            if oldest < start:
                continue
            if min(losses[oldest:seen]) > threshold:
                return (found if any(found) else _only(start, len(losses))), True
            found[oldest] += 1
        return found, False

    def undecided(self, losses: Sequence[float]) -> range:
        """Places of the segments that later losses may count again."""
        total = len(losses)
        return range(total if self.settled(losses)[1] else max(0, total - self.kept), total)

    @property
    def kept(self) -> int:
        """The most segments that are undecided."""
        return max(self.converge, self.tolerance)

    def _threshold(self, losses: Sequence[float], start: int) -> float:
        return (1 + self.ratio) * sum(losses[start : start + self.converge]) / self.converge

    def _oldest(self, seen: int) -> int:
        """Place of the first of the last `tolerance` segments, where `seen` have come."""
        return max(0, seen - self.tolerance)

    def _at_the_beginning(self, losses: Sequence[float], start: int, threshold: float) -> range:
        """Places that count when the valley is found, `converge` losses from its beginning on."""
        shown, surplus = start + self.converge, self.tolerance - self.converge
        if surplus <= 0:
            return range(start + 1, start + 1 - surplus)
        first = self._oldest(shown)
        last = min(first + surplus, shown - 1)
        above = [place for place in range(first, last + 1) if losses[place] > threshold]
        return range(above[-1] + 2 if above else first + 1, last + 1)


def _only(place: int, total: int) -> list[int]:
    return [int(other == place) for other in range(total)]


class ValleyMean:
    """The mean of the segments, each as often as the rule counts it, while they still come.

    Holds that of the segments whose counts are settled, and apart those, at most `rule.kept`, that
    may count again.
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
        (counts, _), undecided = self.rule.settled(self.losses), self.rule.undecided(self.losses)
        for place in [place for place in self.waiting if place not in undecided]:
            decided = self.waiting.pop(place)
            for _ in range(counts[place]):
                self.inside.add(decided)

    def mean(self) -> dict[str, Tensor]:
        """What is averaged if no segment follows; at least one came."""
        mean = copy.deepcopy(self.inside)
        counts = self.rule.counts(self.losses)
        for place, segment in self.waiting.items():
            for _ in range(counts[place]):
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
