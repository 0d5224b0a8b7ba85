"""One step: what it is told (where the run stands, random draws) and what it gives back."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vlx.core import random


@dataclass(slots=True)
class StepOutput:
    """What one step gives back."""

    losses: dict[str, Tensor]
    """Scalars, already weighted; the loop back-propagates the plain sum of all of them."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars, logged only."""


@dataclass(slots=True)
class StepContext:
    """Where the run stands. Random draws of a step come from here and nowhere else."""

    step: int
    total_steps: int
    steps_per_epoch: int
    seed: int
    sample_offset: int = 0
    """Position of this batch's first sample in the step's global batch (rank, micro-batch)."""
    stage: str = "train"
    generator: torch.Generator | None = None
    """Seeded from (seed, step, rank, micro-batch), on the step's device."""
    counts: dict[str, Tensor] = field(default_factory=dict)
    """`Trainable.counts`, mean over the step's micro-batches and processes; set by the loop."""

    @property
    def epoch(self) -> float:
        """Epochs done, fractional."""
        return self.step / self.steps_per_epoch

    def mean(self, total: Tensor, name: str, count: Tensor) -> Tensor:
        """The mean over things whose number differs between batches, as a loss.

        total: sum over this batch's, with gradient; count: their number, which `Trainable.counts`
        gives under `name`. Divides by the step's count where the loop knows it, so that gradients
        of micro-batches and processes are those of the whole batch.
        """
        return total / self.counts.get(name, count.clamp(min=1))

    def uniform(self, like: Tensor, count: int, stream: str) -> Tensor:
        """`(B, count)` float32 in [0, 1), one row per sample of `like (B, ...)`, on its device.

        A row depends on (seed, step, position in the global batch, stream), so masks are the same
        for any split of a batch over processes or micro-batches.
        """
        return random.uniform(self._keys(like, stream), count)

    def normal(self, like: Tensor, count: int, stream: str) -> Tensor:
        """`(B, count)` of N(0, 1), drawn as `uniform` draws."""
        return random.normal(self._keys(like, stream), count)

    def host_generator(self, stream: str) -> np.random.Generator:
        """For the few numbers that a whole batch shares (the lambda of mixup): seeded from (seed,
        step, process and micro-batch, stream). Not torch's: what it draws is read on the host, and
        no device is waited for."""
        return self._host_generator(stream, self.sample_offset)

    def shared_generator(self, stream: str) -> np.random.Generator:
        """As `host_generator`, but the same on every process and in every micro-batch of a step."""
        return self._host_generator(stream, 0)

    def _host_generator(self, stream: str, offset: int) -> np.random.Generator:
        salt = zlib.crc32(stream.encode())
        return np.random.default_rng(random.step_seed(self.seed, self.step, offset, salt))

    def _keys(self, like: Tensor, stream: str) -> Tensor:
        rows = torch.arange(like.shape[0], device=like.device) + self.sample_offset
        return random.key(rows, self.seed, self.step, stream)
