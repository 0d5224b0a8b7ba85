"""One step of training: the gradients of its micro-batches, and the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from vlx.core.fields import Batch
from vlx.core.method import Coupled, Trainable
from vlx.core.random import step_seed
from vlx.core.step import StepContext
from vlx.data.pipeline import Share
from vlx.engine.ema import Ema
from vlx.engine.gradient_cache import cached_gradients
from vlx.engine.parallel import Parallel
from vlx.engine.record import StepRecord
from vlx.engine.swad import Swad


@dataclass(kw_only=True)
class Steps:
    """What the loop does with a method, a step at a time."""

    method: Trainable
    module: nn.Module
    """What wraps the method for several processes."""
    parallel: Parallel
    optimizer: AcceleratedOptimizer
    share: Share
    """Which samples of a step are this process's, in how many micro-batches."""
    seed: int
    total_steps: int
    steps_per_epoch: int
    clip_norm: float | None = None
    average: Ema | Swad | None = None
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(device=self.parallel.device)

    def context(self, step: int, micro: int) -> StepContext:
        """Where a micro-batch stands; no generator is touched."""
        return StepContext(
            step=step,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            seed=self.seed,
            sample_offset=self.share.offset(micro),
            generator=self.generator,
        )

    def seeded(self, step: int, micro: int) -> StepContext:
        """The context of a micro-batch, every generator seeded for it."""
        seed = step_seed(self.seed, step, self.parallel.rank, micro)
        self.parallel.seed(seed)
        self.generator.manual_seed(seed)
        return self.context(step, micro)

    def begin(self, step: int) -> None:
        """What an epoch begins with, where `step` is its first."""
        if step % self.steps_per_epoch == 0:
            self.method.begin_epoch(self.seeded(step, 0))

    def gradients(self, step: int, batches: Iterator[Batch]) -> StepRecord:
        """Gradients of one step, summed over its micro-batches and clipped."""
        accumulate = self.share.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        record = StepRecord()
        if accumulate > 1 and self.method.couples_batch:
            self._cached(step, [next(batches) for _ in range(accumulate)], record)
        else:
            self._accumulated(step, batches, record)
        self.parallel.accelerator.unscale_gradients()
        self.method.before_update(self.context(step, accumulate - 1))
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        record.grad_norm = self.parallel.clip(params, self.clip_norm)
        return record

    def _accumulated(self, step: int, batches: Iterator[Batch], record: StepRecord) -> None:
        parallel, accumulate = self.parallel, self.share.accumulate
        counts: dict[str, Tensor] = {}
        if counted(self.method):  # what a loss is divided by, before the first of them
            parts = [next(batches) for _ in range(accumulate)]
            contexts = [self.context(step, micro) for micro in range(accumulate)]
            counts = mean_counts(self.method, parts, contexts, parallel)
            batches = iter(parts)
        for micro in range(accumulate):
            batch = next(batches)
            ctx = self.seeded(step, micro)
            ctx.counts = counts
            with parallel.accumulate_locally(self.module, micro == accumulate - 1):
                with parallel.accelerator.autocast():
                    losses, metrics = self.module(batch, ctx)
                    loss = total(losses)
                parallel.accelerator.backward(loss / accumulate)
            record.add(batch["sample_id"], losses, metrics)

    def _cached(self, step: int, parts: list[Batch], record: StepRecord) -> None:
        """All micro-batches as one batch, for a loss that compares samples."""
        assert isinstance(self.method, Coupled)
        out = cached_gradients(
            self.method, self.module, self.parallel, parts, lambda micro: self.seeded(step, micro)
        )
        for batch in parts:
            record.add(batch["sample_id"], out.losses, out.metrics)

    def update(self, step: int) -> None:
        """The update, and what follows one: momentum teachers, averages."""
        self.optimizer.step()
        if self.optimizer.step_was_skipped:  # fp16: the scaler found an overflow and halves itself
            return
        self.method.after_step(self.context(step, self.share.accumulate - 1))
        if self.average is not None:
            self.average.update()


def total(losses: dict[str, Tensor]) -> Tensor:
    """The scalar that is differentiated: the plain sum, in float32."""
    return torch.stack([loss.float() for loss in losses.values()]).sum()


def counted(method: Trainable) -> bool:
    """Whether a loss of the method is a mean over what it counts."""
    return type(method).counts is not Trainable.counts


@torch.no_grad()
def mean_counts(
    method: Trainable,
    batches: Sequence[Batch],
    contexts: Sequence[StepContext],
    parallel: Parallel,
) -> dict[str, Tensor]:
    """`Trainable.counts`, mean over the micro-batches and the processes; 1 where nothing counts.

    A micro-batch's sum over this is a loss whose mean over micro-batches and processes, which is
    what the loop takes, is the sum of all over the count of all.
    """
    found = [method.counts(batch, ctx) for batch, ctx in zip(batches, contexts, strict=True)]
    if not found[0]:
        return {}
    rows = [torch.stack([value.float() for value in counts.values()]) for counts in found]
    means = parallel.mean(torch.stack(rows).mean(0))
    return dict(zip(found[0], means.where(means > 0, 1.0).unbind(), strict=True))
