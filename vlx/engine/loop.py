"""The one training loop."""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlx.core.errors import DivergedError, Interrupted
from vlx.core.fields import Batch
from vlx.core.method import StepContext, Trainable
from vlx.data.pipeline import TrainPipeline
from vlx.engine import checkpoint
from vlx.engine.config import RunConfig
from vlx.engine.ema import Ema, copy_full
from vlx.engine.optim import Rates, build_optimizer, layer_scales, peak_lr
from vlx.engine.parallel import Parallel
from vlx.engine.signals import StopRequest
from vlx.track.base import Track
from vlx.track.console import ConsoleProgress

log = logging.getLogger("vlx")
_MIN_SECONDS_BETWEEN_SAVES = 60.0


@dataclass
class Progress:
    """What the loop carries from step to step; saved in every checkpoint."""

    step: int = 0
    skipped: int = 0
    """Steps in a row that were not applied."""
    best: float | None = None
    best_checkpoint: str | None = None
    losses: dict[str, float] = field(default_factory=dict)


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
    ) -> None:
        self.cfg, self.method, self.pipeline, self.parallel = cfg, method, pipeline, parallel
        self.total_steps, self.run_dir, self.hooks = total_steps, run_dir, hooks
        self.saved_config = saved_config
        self.checkpoints = run_dir / "checkpoints"
        self.progress = Progress()
        self.module: nn.Module = parallel.wrap(method, cfg.train.compile)
        self.method.train()
        groups = method.param_groups()
        if cfg.optim.layer_decay is not None:
            groups = layer_scales(groups, method, cfg.optim.layer_decay)
        peak = peak_lr(cfg.optim, cfg.train.batch_size)
        self.rates = Rates(
            cfg.schedule, peak, cfg.optim.weight_decay, total_steps, pipeline.steps_per_epoch
        )
        self.optimizer = parallel.accelerator.prepare_optimizer(
            build_optimizer(cfg.optim, groups, peak)
        )
        self.params = [param for group in groups for _, param in group.params]
        self.ema = None if cfg.train.ema_decay is None else Ema(method, cfg.train.ema_decay)
        self._generator = torch.Generator(device=parallel.device)
        self._last_save = time.monotonic()

    def fit(self) -> None:
        """Train to `total_steps`. Raises `Interrupted` after saving when a signal asks."""
        train, spe = self.cfg.train, self.pipeline.steps_per_epoch
        batches = self.pipeline.batches(self.progress.step, self.total_steps)
        clock = _Clock(train.batch_size // train.accumulate)
        for step in range(self.progress.step, self.total_steps):
            if step % spe == 0:
                self.method.begin_epoch(self._context(step, 0))
            record = self._update(step, batches, clock)
            done = self.progress.step = step + 1
            if done % train.log_every == 0 or done == self.total_steps:
                self._log(done, record, clock)
            epochs_done, at_edge = divmod(done, spe)
            evaluated = False
            if at_edge == 0 and self.cfg.eval.every_epochs:
                evaluated = epochs_done % self.cfg.eval.every_epochs == 0
            improved = self._evaluate(done) if evaluated else False
            stop, due = self.parallel.flags(bool(self.hooks.stop), self._save_due(done))
            if stop or due or improved:
                self.save()
            if stop:
                raise Interrupted(f"stopped by {self.hooks.stop.signal or 'another process'}")

    def _context(self, step: int, micro_step: int) -> StepContext:
        return StepContext(
            step=step,
            total_steps=self.total_steps,
            steps_per_epoch=self.pipeline.steps_per_epoch,
            seed=self.cfg.seed,
            sample_offset=self.pipeline.share.offset(micro_step),
            generator=self._generator,
        )

    def _update(self, step: int, batches: Any, clock: _Clock) -> _Record:
        """One optimizer step over all its micro-batches; not applied when it is not finite."""
        parallel, accumulate = self.parallel, self.cfg.train.accumulate
        self.rates.apply(self.optimizer, step)
        self.optimizer.zero_grad(set_to_none=True)
        record = _Record()
        for micro in range(accumulate):
            with clock.waiting():
                batch: Batch = next(batches)
            seed = _step_seed(self.cfg.seed, step, parallel.rank, micro)
            torch.manual_seed(seed)
            self._generator.manual_seed(seed)
            ctx = self._context(step, micro)
            last = micro == accumulate - 1
            with parallel.accumulate_locally(self.module, last), parallel.accelerator.autocast():
                losses, metrics = self.module(batch, ctx)
                total = torch.stack([loss.float() for loss in losses.values()]).sum()
            with parallel.accumulate_locally(self.module, last):
                parallel.accelerator.backward(total / accumulate)
            record.add(batch, losses, metrics)
        ctx = self._context(step, accumulate - 1)
        parallel.accelerator.unscale_gradients()
        self.method.before_update(ctx)
        record.grad_norm = parallel.clip(self.params, self.cfg.optim.clip_norm)
        if self._is_applied(record):
            self.optimizer.step()
            self.method.after_step(ctx)
            if self.ema is not None:
                self.ema.update()
            self.progress.skipped = 0
        else:
            self._skip(step, record)
        return record

    def _is_applied(self, record: _Record) -> bool:
        values = [torch.stack(list(losses.values())).sum() for losses in record.losses]
        total = torch.stack(values).sum()
        if not self.parallel.scaled:  # a scaler leaves overflown fp16 steps out by itself
            total = total + record.grad_norm
        (bad,) = self.parallel.flags(not bool(torch.isfinite(total)))
        return not bad

    def _skip(self, step: int, record: _Record) -> None:
        """Leave out an update that is not finite; past the limit, keep the evidence and stop."""
        self.progress.skipped += 1
        losses = {k: float(v) for k, v in record.mean_losses().items()}
        limit = self.cfg.train.max_skipped_steps
        log.warning(
            f"step {step + 1}: loss or gradient is not finite ({losses}); update left out "
            f"({self.progress.skipped} of at most {limit} in a row)"
        )
        if self.progress.skipped <= limit:
            return
        folder = self.run_dir / "nonfinite" / f"step-{step + 1:08d}-rank{self.parallel.rank}"
        checkpoint.save(folder, self._snapshot(step))
        ids = [batch["sample_id"].tolist() for batch in record.batches]
        evidence = {"step": step + 1, "losses": losses, "sample_ids": ids, "seed": self.cfg.seed}
        (folder / "evidence.json").write_text(json.dumps(evidence, indent=1))
        names = [self.pipeline.source.describe(i) for i in ids[0][:3]]
        raise DivergedError(
            f"step {step + 1}: not finite for {self.progress.skipped} steps in a row "
            f"(losses {losses}; samples {', '.join(names)}, ...). Weights and sample ids are in "
            f"{folder}. Lower optim.lr, set optim.clip_norm=1, or use train.precision=fp32"
        )

    def _log(self, done: int, record: _Record, clock: _Clock) -> None:
        losses = {k: float(self.parallel.mean(v)) for k, v in record.mean_losses().items()}
        self.progress.losses = losses
        metrics = {k: float(self.parallel.mean(v)) for k, v in record.mean_metrics().items()}
        speed, wait = clock.read()
        values = {f"train/loss/{name}": value for name, value in losses.items()}
        values |= {f"train/metric/{name}": value for name, value in metrics.items()}
        values["train/loss"] = sum(losses.values())
        values["optim/lr"] = self.rates.lr(done - 1)
        values["optim/weight_decay"] = self.rates.decay(done - 1)
        values["optim/grad_norm"] = float(record.grad_norm)
        values["train/epoch"] = done / self.pipeline.steps_per_epoch
        values["train/sample_hash"] = record.sample_hash()
        values |= {"perf/images_per_s": speed, "perf/data_wait": wait}
        if self.parallel.is_main:
            self.hooks.track.log(done, values)
            self.hooks.console.update(done, values["train/loss"], speed, wait)

    def _evaluate(self, done: int) -> bool:
        """Evaluate during training; True when the metric of `keep_best` has improved."""
        metrics = self.evaluate_with(self.hooks.evaluate, done)
        if self.parallel.is_main:
            self.hooks.track.log(done, {f"eval/{name}": value for name, value in metrics.items()})
        watched = self.cfg.train.keep_best
        if watched is None or watched not in metrics:
            return False
        if self.progress.best is not None and metrics[watched] <= self.progress.best:
            return False
        self.progress.best = metrics[watched]
        self.progress.best_checkpoint = f"step-{done:08d}"
        return True

    def evaluate_with(self, evaluate: Callable[[int], dict[str, float]], done: int) -> dict:
        """Call an evaluation in eval mode, on averaged weights where there are any."""
        self.method.eval()
        with self.parallel.whole(self.module), torch.no_grad():
            if self.ema is None:
                metrics = evaluate(done)
            else:
                with self.ema.swapped():
                    metrics = evaluate(done)
        self.method.train()
        return metrics

    def _save_due(self, done: int) -> bool:
        if done == self.total_steps:
            return True
        every = self.cfg.train.checkpoint_every
        if every is not None:
            return done % every == 0
        due = time.monotonic() - self._last_save > _MIN_SECONDS_BETWEEN_SAVES
        return due and done % self.pipeline.steps_per_epoch == 0

    def _snapshot(self, step: int) -> checkpoint.Snapshot:
        scaler = self.parallel.accelerator.scaler
        return checkpoint.Snapshot(
            step=step,
            model={k: checkpoint.full(v) for k, v in self.method.state_dict().items()},
            optimizer=checkpoint.optimizer_tensors(self.optimizer),
            ema={k: checkpoint.full(v) for k, v in self.ema.shadow.items()} if self.ema else {},
            state={
                "step": step,
                "progress": vars(self.progress),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "slug": self.cfg.slug,
                "config": self.saved_config,
            },
        )

    def save(self) -> None:
        """Write a checkpoint of this step and remove old ones."""
        snapshot = self._snapshot(self.progress.step)
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
        if self.ema is not None:
            self.ema.load(snapshot.ema)
        if snapshot.state["scaler"] is not None and self.parallel.accelerator.scaler is not None:
            self.parallel.accelerator.scaler.load_state_dict(snapshot.state["scaler"])
        self.progress = Progress(**snapshot.state["progress"])


@dataclass
class _Record:
    """What one step left behind, still on the device."""

    batches: list[Batch] = field(default_factory=list)
    losses: list[dict[str, Tensor]] = field(default_factory=list)
    metrics: list[dict[str, Tensor]] = field(default_factory=list)
    grad_norm: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, batch: Batch, losses: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
        self.batches.append({"sample_id": batch["sample_id"]})
        self.losses.append({name: loss.detach() for name, loss in losses.items()})
        self.metrics.append({name: value.detach() for name, value in metrics.items()})

    def mean_losses(self) -> dict[str, Tensor]:
        return _mean(self.losses)

    def mean_metrics(self) -> dict[str, Tensor]:
        return _mean(self.metrics)

    def sample_hash(self) -> int:
        """CRC-32 of the sample ids: equal for two runs that saw the same samples in this step."""
        ids = torch.cat([batch["sample_id"] for batch in self.batches])
        return zlib.crc32(ids.cpu().numpy().tobytes())


def _mean(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: torch.stack([row[name].float() for row in rows if name in row]).mean()
        for name in names
    }


class _Clock:
    """Images a second and the share of time spent waiting for data, since the last reading."""

    def __init__(self, micro_batch_size: int) -> None:
        self.micro_batch_size = micro_batch_size
        self._start = time.perf_counter()
        self._waited = 0.0
        self._batches = 0
        self._entered = 0.0

    def waiting(self) -> _Clock:
        return self

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._waited += time.perf_counter() - self._entered
        self._batches += 1

    def read(self) -> tuple[float, float]:
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        result = self._batches * self.micro_batch_size / elapsed, self._waited / elapsed
        self._start, self._waited, self._batches = now, 0.0, 0
        return result


def _step_seed(seed: int, step: int, rank: int, micro: int) -> int:
    """A seed for torch's global generators, so that dropout resumes exactly."""
    return zlib.crc32(f"{seed}/{step}/{rank}/{micro}".encode())
