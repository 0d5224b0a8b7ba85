"""The one training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from vlx.core.errors import ConfigError, DivergedError, Interrupted, nearest
from vlx.core.fields import Batch
from vlx.core.method import Trainable
from vlx.data.pipeline import TrainPipeline
from vlx.engine import checkpoint
from vlx.engine.build import begin_training
from vlx.engine.config import RunConfig
from vlx.engine.ema import copy_full
from vlx.engine.frozen_towers import FrozenTowers
from vlx.engine.nonfinite import Evidence, save_evidence
from vlx.engine.optim import build_optimizer, layer_scales, peak_lr
from vlx.engine.parallel import Parallel
from vlx.engine.record import Clock, StepRecord, sample_hash
from vlx.engine.schedule import Rates
from vlx.engine.signals import StopRequest
from vlx.engine.step import Steps
from vlx.engine.swad import Swad, averaging
from vlx.track.base import Track
from vlx.track.console import ConsoleProgress

log = logging.getLogger("vlx")
_MIN_SECONDS_BETWEEN_SAVES = 60.0
T = TypeVar("T")


@dataclass
class Progress:
    """What the loop carries from step to step; saved in every checkpoint."""

    step: int = 0
    skipped: int = 0
    """Steps in a row that were not applied."""
    best: float | None = None
    best_checkpoint: str | None = None
    losses: dict[str, float] = field(default_factory=dict)
    """As last logged."""
    seconds: float = 0.0
    """Spent so far, over all resumes."""


@dataclass
class Hooks:
    """What the run gives the loop to call."""

    evaluate: Callable[[int], dict[str, float]]
    """Evaluates during training; returns metrics by name."""
    track: Track
    console: ConsoleProgress
    stop: StopRequest
    on_save: Callable[[int], None]


class Trainer:
    """Steps a method through a pipeline. `progress.step` counts the updates done."""

    def __init__(
        self,
        cfg: RunConfig,
        method: Trainable,
        pipeline: TrainPipeline,
        parallel: Parallel,
        *,
        total_steps: int,
        run_dir: Path,
        hooks: Hooks,
        saved_config: dict[str, Any],
        frozen: FrozenTowers,
    ) -> None:
        self.cfg, self.method, self.pipeline, self.parallel = cfg, method, pipeline, parallel
        self.total_steps, self.run_dir, self.hooks = total_steps, run_dir, hooks
        self.saved_config, self.frozen = saved_config, frozen
        self.checkpoints = run_dir / "checkpoints"
        self.progress = Progress()
        self.module: nn.Module = parallel.wrap(method, cfg.train.compile)
        begin_training(method, cfg.train)
        groups = method.param_groups()
        if cfg.optim.layer_decay is not None:
            groups = layer_scales(groups, method, cfg.optim.layer_decay)
        peak = peak_lr(cfg.optim, cfg.train.batch_size)
        self.rates = Rates(
            cfg.schedule, peak, cfg.optim.weight_decay, total_steps, pipeline.steps_per_epoch
        )
        optimizer = build_optimizer(cfg.optim, groups, peak)
        prepared = parallel.accelerator.prepare_optimizer(optimizer)
        assert isinstance(prepared, AcceleratedOptimizer)
        self.optimizer = prepared
        self.average = averaging(cfg.train, method)
        self.steps = Steps(
            method=method,
            module=self.module,
            parallel=parallel,
            optimizer=prepared,
            share=pipeline.share,
            seed=cfg.seed,
            total_steps=total_steps,
            steps_per_epoch=pipeline.steps_per_epoch,
            clip_norm=cfg.optim.clip_norm,
            average=self.average,
        )
        due = map(self._evaluation_due, range(1, total_steps + 1))
        if cfg.train.swad is not None and not any(due):
            raise ConfigError(
                f"train.swad: no evaluation within {total_steps} steps: lower eval.every_steps"
            )
        self._last_save = self._counted = time.monotonic()

    def fit(self) -> None:
        """Train to `total_steps`. Raises `Interrupted` after saving when a signal asks."""
        train = self.cfg.train
        self.frozen.watch(self.method)
        clock = Clock(train.batch_size // train.accumulate)
        batches = clock.timed(self.pipeline.batches(self.progress.step, self.total_steps))
        for step in range(self.progress.step, self.total_steps):
            self.steps.begin(step)
            record = self._gradients(step, batches)
            done = step + 1
            # One exchange a step: what one process finds, all do.
            bad, stop, due = self.parallel.flags(
                not record.is_finite(gradients=not self.parallel.scaled),
                bool(self.hooks.stop),
                self._save_due(done),
            )
            self._skip(step, record) if bad else self._apply(step)
            self.progress.step = done
            if done % train.log_every == 0 or done == self.total_steps:
                self._log(done, record, clock)
            improved = False
            if self._evaluation_due(done):
                improved, late = self.parallel.flags(self._evaluate(done), bool(self.hooks.stop))
                stop = stop or late
            if stop or due or improved:
                self.save()
            if due or self._evaluation_due(done):
                clock.restart()
            if stop:
                raise Interrupted(f"stopped by {self.hooks.stop.signal_name}")

    def _gradients(self, step: int, batches: Iterator[Batch]) -> StepRecord:
        """Gradients of one step at its rates."""
        self.rates.apply(self.optimizer, step)
        return self.steps.gradients(step, batches)

    def _apply(self, step: int) -> None:
        self.progress.skipped = 0
        self.steps.update(step)

    def _skip(self, step: int, record: StepRecord) -> None:
        """Leave out an update that is not finite; past the limit, keep the evidence and stop."""
        self.progress.skipped += 1
        means = record.mean_losses()
        losses = {name: float(self.parallel.mean(value)) for name, value in means.items()}
        limit = self.cfg.train.max_skipped_steps
        log.warning(
            f"step {step + 1}: loss or gradient is not finite ({losses}); update left out "
            f"({self.progress.skipped} of at most {limit} in a row)"
        )
        if self.progress.skipped <= limit:
            return
        evidence = Evidence(
            step=step,
            world=self.parallel.world,
            losses=losses,
            grad_norm=float(record.grad_norm),
            sample_ids=self.parallel.gather(record.ids()).tolist(),
        )
        snapshot = self._snapshot()
        if self.parallel.is_main:
            save_evidence(self.run_dir, evidence, snapshot)
        names = [self.pipeline.source.describe(i) for i in evidence.sample_ids[0][0][:3]]
        raise DivergedError(
            f"step {step + 1}: not finite for {self.progress.skipped} steps in a row "
            f"(losses {losses}; samples {', '.join(names)}, ...). `vlx replay {self.run_dir}` "
            "computes it again. Lower optim.lr, set optim.clip_norm=1, or use train.precision=fp32"
        )

    def _log(self, done: int, record: StepRecord, clock: Clock) -> None:
        losses, metrics = record.mean_losses(), record.mean_metrics()
        names = [*(f"train/loss/{n}" for n in losses), *(f"train/metric/{n}" for n in metrics)]
        means = self.parallel.mean(torch.stack([*losses.values(), *metrics.values()])).tolist()
        values = dict(zip(names, means))
        self.progress.losses = dict(zip(losses, means))
        values["train/loss"] = sum(self.progress.losses.values())
        values["optim/lr"] = self.rates.lr(done - 1)
        values["optim/weight_decay"] = self.rates.decay(done - 1)
        values["optim/grad_norm"] = float(record.grad_norm)
        values["train/epoch"] = done / self.pipeline.steps_per_epoch
        values["train/sample_hash"] = sample_hash(self.parallel.gather(record.ids()))
        speed, wait = clock.read()
        values |= {"perf/images_per_s": speed, "perf/data_wait": wait}
        if self.parallel.is_main:
            self.hooks.track.log(done, values)
            self.hooks.console.update(done, values["train/loss"], speed, wait)

    def _evaluation_due(self, done: int) -> bool:
        if self.cfg.eval.every_steps:
            return done % self.cfg.eval.every_steps == 0
        epochs, beyond = divmod(done, self.pipeline.steps_per_epoch)
        every = self.cfg.eval.every_epochs
        return beyond == 0 and every > 0 and epochs % every == 0

    def _evaluate(self, done: int) -> bool:
        """Evaluate during training; True when the metric of `keep_best` has improved."""
        train = self.cfg.train
        metrics = self.evaluate_with(lambda: self.hooks.evaluate(done), averaged=train.swad is None)
        if self.parallel.is_main:
            split = "eval" if self.cfg.data.val_split is None else "val"
            self.hooks.track.log(done, {f"{split}/{n}": value for n, value in metrics.items()})
        if isinstance(self.average, Swad):
            self.average.close(_watched("swad", train.swad, metrics))
        if train.keep_best is None:
            return False
        name = train.keep_best.removeprefix("-")
        value = _watched("keep_best", name, metrics)
        value = -value if name != train.keep_best else value
        if self.progress.best is not None and value <= self.progress.best:
            return False
        self.progress.best = value
        self.progress.best_checkpoint = f"step-{done:08d}"
        return True

    def evaluate_with(self, evaluate: Callable[[], T], *, averaged: bool = True) -> T:
        """Call an evaluation in eval mode, on averaged weights where there are any, if `averaged`.

        Seeded alike every time: some models draw at random in evaluation too.
        """
        self.method.eval()
        self.parallel.seed(self.cfg.seed)
        try:
            average = self.average if averaged else None
            with nullcontext() if average is None else average.swapped(), torch.no_grad():
                return self.parallel.whole(self.module, evaluate)
        finally:
            begin_training(self.method, self.cfg.train)

    def _save_due(self, done: int) -> bool:
        if done == self.total_steps:
            return True
        every = self.cfg.train.checkpoint_every
        if every is not None:
            return done % every == 0
        due = time.monotonic() - self._last_save > _MIN_SECONDS_BETWEEN_SAVES
        return due and done % self.pipeline.steps_per_epoch == 0

    def _snapshot(self) -> checkpoint.Snapshot:
        """Everything as it stands; on every process, with tensors on the main one alone."""
        scaler, keep, step = (
            self.parallel.accelerator.scaler,
            self.parallel.is_main,
            self.progress.step,
        )
        average = self.average
        self.frozen.check(self.method)
        own = self.method.state_dict()
        changing = {name: own[name] for name in own if name not in self.frozen.tensors}
        self.progress.seconds += time.monotonic() - self._counted
        self._counted = time.monotonic()
        return checkpoint.Snapshot(
            step=step,
            model=checkpoint.gather(changing, keep=keep),
            optimizer=checkpoint.optimizer_tensors(self.optimizer, keep=keep),
            ema=checkpoint.gather(average.shadow, keep=keep) if average else {},
            swad=checkpoint.gather(average.state(), keep=keep) if isinstance(average, Swad) else {},
            state={
                "step": step,
                "progress": asdict(self.progress),
                "bad_samples": {str(k): v for k, v in self.pipeline.bad.reasons.items()},
                "scaler": scaler.state_dict() if scaler is not None else None,
                "slug": self.cfg.slug,
                "config": self.saved_config,
            },
            towers=self.frozen.towers,
        )

    def save(self) -> None:
        """Write a checkpoint of this step and remove old ones."""
        snapshot = self._snapshot()
        if self.parallel.is_main:
            checkpoint.save(self.checkpoints, snapshot)
            best = self.progress.best_checkpoint
            checkpoint.prune(self.checkpoints, self.cfg.train.keep_last, best)
            self.hooks.on_save(self.progress.step)
        self._last_save = time.monotonic()
        self.parallel.barrier()

    @torch.no_grad()
    def restore(self, snapshot: checkpoint.Snapshot) -> None:
        """Continue from a checkpoint, exactly where it stood."""
        own = self.method.state_dict()
        checkpoint.check_keys(own, snapshot.model)
        for name, value in snapshot.model.items():
            copy_full(own[name], value)
        checkpoint.load_optimizer(self.optimizer, snapshot.optimizer)
        if isinstance(self.average, Swad):
            self.average.load(snapshot.swad)
        elif self.average is not None:
            self.average.load(snapshot.ema)
        if snapshot.state["scaler"] is not None and self.parallel.accelerator.scaler is not None:
            self.parallel.accelerator.scaler.load_state_dict(snapshot.state["scaler"])
        self.progress = Progress(**snapshot.state["progress"])
        saved = snapshot.state["bad_samples"]
        self.pipeline.bad.reasons.update({int(k): reason for k, reason in saved.items()})


def _watched(key: str, name: str | None, metrics: dict[str, float]) -> float:
    """The value of the metric that `train.KEY` names."""
    if name not in metrics:
        raise ConfigError(
            f"train.{key}={name}: no such metric during training. {nearest(str(name), metrics)} "
            "eval.during names the evaluators"
        )
    return metrics[name]
