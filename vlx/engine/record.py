"""What one step leaves behind, and how fast steps go."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlx.core.fields import Batch


@dataclass
class StepRecord:
    """Losses, metrics and samples of one step's micro-batches, still on the device."""

    sample_ids: list[Tensor] = field(default_factory=list)
    losses: list[dict[str, Tensor]] = field(default_factory=list)
    metrics: list[dict[str, Tensor]] = field(default_factory=list)
    grad_norm: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, sample_id: Tensor, losses: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
        self.sample_ids.append(sample_id)
        self.losses.append({name: loss.detach() for name, loss in losses.items()})
        self.metrics.append({name: value.detach() for name, value in metrics.items()})

    def is_finite(self, *, gradients: bool) -> bool:
        """Whether all losses are, and with `gradients` their gradient. Waits for the device."""
        total = sum(sum(losses.values()) for losses in self.losses)
        if gradients:
            total = total + self.grad_norm
        return bool(torch.isfinite(torch.as_tensor(total)))

    def mean_losses(self) -> dict[str, Tensor]:
        """Means over micro-batches."""
        return _mean(self.losses)

    def mean_metrics(self) -> dict[str, Tensor]:
        """Means over the micro-batches that report the metric."""
        return _mean(self.metrics)

    def ids(self) -> Tensor:
        """(micro-batches, samples) of this process."""
        return torch.stack(self.sample_ids)


def sample_hash(ids: Tensor) -> int:
    """CRC-32 of one step's sample ids, (processes, micro-batches, samples), in the order of the
    global batch: equal for any two runs that saw the same samples, however they were split."""
    return zlib.crc32(ids.transpose(0, 1).flatten().cpu().numpy().tobytes())


def _mean(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: torch.stack([row[name].float() for row in rows if name in row]).mean()
        for name in names
    }


class Clock:
    """Images a second and the share of time spent waiting for data, since the last reading.

    Used as a context around the wait for a batch, or by `timed`.
    """

    def __init__(self, micro_batch_size: int) -> None:
        self.micro_batch_size = micro_batch_size
        self.restart()
        self._entered = 0.0

    def restart(self) -> None:
        """Count from now: evaluations and checkpoints are no part of the speed."""
        self._start, self._waited, self._batches = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, the wait for each counted."""
        while True:
            with self:
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._waited += time.perf_counter() - self._entered
        self._batches += 1

    def read(self) -> tuple[float, float]:
        """(images a second, share of the time spent waiting); starts counting anew."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        result = self._batches * self.micro_batch_size / elapsed, self._waited / elapsed
        self.restart()
        return result
