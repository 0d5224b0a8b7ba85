"""Alternating measurements of two ways to do the same work, in one process."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` is ours over the peer's in `unit`; `target` is its bound in words."""

    name: str
    ours: float
    peer: float
    unit: str
    peer_name: str
    target: str

    @property
    def ratio(self) -> float:
        return self.ours / self.peer

    def markdown(self) -> str:
        return (
            f"| {self.name} | {self.ours:,.4g} {self.unit} | {self.peer:,.4g} {self.unit} "
            f"({self.peer_name}) | {self.ratio:.3f} | {self.target} |"
        )


HEADER = "| what | vlx | peer | ratio vlx/peer | target |\n|---|---|---|---|---|"


def peak_mib() -> float:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alternate(
    ours: Callable[[], object], peer: Callable[[], object], *, rounds: int, warmup: int = 1
) -> tuple[float, float]:
    """Median seconds of each, the order swapped every round."""
    for _ in range(warmup):
        ours()
        peer()
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        order = ((0, ours), (1, peer)) if number % 2 == 0 else ((1, peer), (0, ours))
        for slot, work in order:
            start = time.perf_counter()
            work()
            times[slot].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
