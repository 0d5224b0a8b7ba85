"""One run from its directory to its results: what every process of a run executes."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import resource
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlx.core import registry
from vlx.core.errors import EXIT_INTERRUPTED, EXIT_OK, ConfigError, Interrupted, VlxError
from vlx.core.files import write_json
from vlx.core.method import Trainable
from vlx.core.results import Metric, Results
from vlx.data.open import open_source
from vlx.data.pipeline import Share, TrainPipeline
from vlx.encoders.build import EncoderBuilder
from vlx.engine import checkpoint, rundir
from vlx.engine.config import RunConfig
from vlx.engine.environment import hardware
from vlx.engine.evaluate import Outcome, run_evaluators
from vlx.engine.evaluate_encoder import execute_evaluation
from vlx.engine.load import read_config, run_config
from vlx.engine.loop import Hooks, Trainer
from vlx.engine.parallel import Parallel
from vlx.engine.signals import StopRequest, stop_on_signals
from vlx.evals.base import EvalData, Subject
from vlx.track.base import Fanout, Track
from vlx.track.config import Tracker
from vlx.track.console import ConsoleProgress
from vlx.track.jsonl import JsonlTrack

log = logging.getLogger("vlx")
_UNTRAINED = "untrained.json"


def execute(run_dir: Path, *, console: Console | None = None) -> int:
    """Run, or go on with, the run of a directory. Returns an exit code of `core.errors`.

    Raises `VlxError` for what the user can mend; `run.json` then says failed, with the reason.
    """
    values = read_config(run_dir)
    if values["method"] is None:  # `vlx eval`: an encoder, no method
        return execute_evaluation(run_dir, values)
    cfg = run_config(values)
    with stop_on_signals() as stop:
        parallel = Parallel(cfg.train, cfg.launcher)
        try:
            with rundir.locked(run_dir) if parallel.is_main else nullcontext():
                run = Run(run_dir, cfg, values, parallel, stop, console)
                return run.execute()
        finally:
            parallel.close()


class Run:
    """The parts of a run, put together."""

    def __init__(
        self,
        run_dir: Path,
        cfg: RunConfig,
        values: dict[str, Any],
        parallel: Parallel,
        stop: StopRequest,
        console: Console | None,
    ) -> None:
        self.run_dir, self.cfg, self.values = run_dir, cfg, values
        self.parallel, self.stop = parallel, stop
        self.console = console or Console(quiet=not parallel.is_main)
        self.record = rundir.read_record(run_dir)
        self.started = time.monotonic()
        self.initial_wall_time = 0.0
        _log_to(run_dir, parallel.rank)

    def execute(self) -> int:
        """Train, evaluate, write results; keep `run.json` telling the truth throughout."""
        self._mark("running")
        track: Track | None = None
        code = 1
        try:
            trainer, untrained, track = self._prepare()
            trainer.fit()
            self._finish(trainer, untrained, track)
            self._mark("finished")
            code = EXIT_OK
        except Interrupted as reason:
            self._mark("interrupted", str(reason))
            self.console.print(
                f"Saved at step {self.record.step}. To go on: vlx resume {self.run_dir}"
            )
            code = EXIT_INTERRUPTED
        except VlxError as error:
            code = error.exit_code
            self._mark("failed", str(error))
            raise
        except BaseException as error:
            self._mark("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            if track is not None:
                track.close(code)
        return code

    def _mark(self, state: str, message: str = "") -> None:
        self.record.state, self.record.message = state, message
        if self.parallel.is_main:
            self.record.write(self.run_dir)

    def _prepare(self) -> tuple[Trainer, list[Metric], Track]:
        cfg, parallel = self.cfg, self.parallel
        snapshot = self._latest()
        cls = registry.load(cfg.slug)
        if not issubclass(cls, Trainable):
            raise ConfigError(f"{cfg.slug} has no training step")
        source = open_source(cfg.data, cfg.data.train_split)
        torch.manual_seed(cfg.seed)
        roles = {"encoder": cfg.encoder, "teacher": cfg.teacher}
        builder = EncoderBuilder(roles, source.info.num_classes, load_weights=snapshot is None)
        method = cls(cfg.method, builder)
        if method.couples_batch and cfg.train.accumulate > 1:
            raise ConfigError(
                f"train.accumulate={cfg.train.accumulate}: a loss of {cfg.slug} compares the "
                "samples of a batch, so micro-batches would change it. Use train.accumulate=1"
            )
        pipeline = TrainPipeline(
            source,
            cls.needs(cfg.method),
            cfg=cfg.data,
            image_size=cfg.encoder.image_size,
            seed=cfg.seed,
            share=Share(cfg.train.batch_size, cfg.train.accumulate, parallel.rank, parallel.world),
            device=parallel.device,
        )
        total = total_steps(cfg, pipeline.steps_per_epoch)
        self.eval_data = EvalData(
            cfg.data,
            cfg.eval,
            image_size=cfg.encoder.image_size,
            device=parallel.device,
            rank=parallel.rank,
            world=parallel.world,
        )
        start = snapshot.step if snapshot else 0
        self.record.total_steps, self.record.step = total, start
        track = self._open_track(start)
        progress = ConsoleProgress(self.console, f"{cfg.command} {cfg.slug}", start, total)
        hooks = Hooks(self._evaluate_during, track, progress, self.stop, self._saved)
        trainer = Trainer(
            cfg,
            method,
            pipeline,
            parallel,
            total_steps=total,
            run_dir=self.run_dir,
            hooks=hooks,
            saved_config=self.values,
        )
        self.method = method
        untrained = self._untrained(trainer, snapshot)
        if snapshot is not None:
            trainer.restore(snapshot)
            log.info(f"resumed at step {start} of {total}")
        return trainer, untrained, track

    def _latest(self) -> checkpoint.Snapshot | None:
        """The newest good checkpoint; refuses one of another configuration."""
        found = checkpoint.latest(self.run_dir / "checkpoints")
        if found is None:
            return None
        snapshot = checkpoint.load(found)
        check_same_config(snapshot.state["config"], self.values)
        return snapshot

    def _open_track(self, start: int) -> Track:
        if not self.parallel.is_main:
            return Fanout([])
        sinks: list[Track] = [JsonlTrack(self.run_dir / "metrics.jsonl", start)]
        if self.cfg.track.name is Tracker.wandb:
            try:
                from vlx.track.wandb import WandbTrack

                sinks.append(
                    WandbTrack(
                        self.cfg.track,
                        run_dir=self.run_dir,
                        run_id=self.record.wandb_id,
                        name=self.run_dir.name,
                        config=self.values,
                    )
                )
            except Exception as error:  # no network, bad key: the run goes on without
                log.warning(f"W&B is off for this run: {error}. track=none silences this")
        return Fanout(sinks)

    def _saved(self, step: int) -> None:
        self.record.step = step
        self.record.write(self.run_dir)

    def _subject(self) -> Subject:
        return Subject(self.cfg.slug, self.method.exports())

    def _evaluate_during(self, step: int) -> dict[str, float]:
        outcome = run_evaluators(
            self.cfg.eval.during,
            self._subject(),
            self.eval_data,
            weights=self._weights(),
            pictures_dir=None,
        )
        return {metric.name: metric.value for metric in outcome.metrics}

    def _weights(self) -> str:
        return "trained" if self.cfg.train.ema_decay is None else "ema"

    def _evaluate_end(self, trainer: Trainer, weights: str) -> Outcome:
        outcome: list[Outcome] = []

        def evaluate(step: int) -> dict[str, float]:
            outcome.append(
                run_evaluators(
                    self.cfg.eval.at_end,
                    self._subject(),
                    self.eval_data,
                    weights=weights,
                    pictures_dir=self.run_dir / "pictures",
                    main=self.parallel.is_main,
                )
            )
            return {}

        trainer.evaluate_with(evaluate, trainer.progress.step)
        return outcome[0]

    def _untrained(self, trainer: Trainer, snapshot: checkpoint.Snapshot | None) -> list[Metric]:
        """What the model scores before training; measured once, read back on resume."""
        file = self.run_dir / _UNTRAINED
        if not self.cfg.eval.compare_untrained or not self.cfg.eval.at_end:
            return []
        if file.exists():
            return [Metric(**metric) for metric in json.loads(file.read_text())]
        if snapshot is not None:
            return []
        metrics = self._evaluate_end(trainer, "untrained").metrics
        if self.parallel.is_main:
            write_json(file, [asdict(metric) for metric in metrics])
        return metrics

    def _finish(self, trainer: Trainer, untrained: list[Metric], track: Track) -> None:
        trainer.hooks.console.close()
        wall = time.monotonic() - self.started
        outcome = self._evaluate_end(trainer, self._weights())
        step = trainer.progress.step
        checksum = weights_checksum(self.method)  # gathers shards: on every process
        if not self.parallel.is_main:
            return
        track.log(step, {f"eval/{m.name}": m.value for m in outcome.metrics})
        for picture in outcome.pictures:
            track.picture(step, f"pictures/{picture.stem}", picture)
        metrics = [*untrained, *outcome.metrics]
        rows = [[m.name, m.weights, m.value, m.split, m.protocol] for m in metrics]
        track.table(step, "results", ["metric", "weights", "value", "split", "protocol"], rows)
        self._write_results(trainer, metrics, checksum, wall)

    def _write_results(
        self, trainer: Trainer, metrics: list[Metric], checksum: str, wall: float
    ) -> None:
        cfg, pipeline = self.cfg, trainer.pipeline
        device = self.parallel.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        all_pictures = sorted((self.run_dir / "pictures").glob("*.png"))
        Results(
            run=self.run_dir.name,
            command=cfg.command,
            method=cfg.slug,
            preset=cfg.preset,
            seed=cfg.seed,
            config_hash=self.record.config_hash,
            data_fingerprint=pipeline.source.info.fingerprint,
            weights_checksum=checksum,
            steps=trainer.progress.step,
            epochs=trainer.progress.step / pipeline.steps_per_epoch,
            final_losses=trainer.progress.losses,
            metrics=metrics,
            bad_samples=len(pipeline.bad.reasons),
            hardware=hardware(str(device), self.parallel.world),
            versions=self.record.versions,
            commit=self.record.commit,
            wall_time_s=round(wall, 2),
            peak_memory_mb=round(peak, 1),
            finished=rundir.now(),
            pictures=[str(p.relative_to(self.run_dir)) for p in all_pictures],
        ).write(self.run_dir)


def total_steps(cfg: RunConfig, steps_per_epoch: int) -> int:
    """`train.steps`, or `train.epochs` in steps."""
    if cfg.train.steps is not None:
        return cfg.train.steps
    assert cfg.train.epochs is not None
    return max(1, math.floor(cfg.train.epochs * steps_per_epoch))


def weights_checksum(method: torch.nn.Module) -> str:
    """SHA-256 over names and bytes of the method's state; 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(method.state_dict().items()):
        digest.update(name.encode())
        digest.update(checkpoint.full(tensor).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_same_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to resume under a changed config, with the difference."""
    old, new = rundir.flatten(saved), rundir.flatten(current)
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not rundir.is_harmless(key)
    ]
    if changed:
        raise ConfigError(
            f"the checkpoint was made with another configuration ({'; '.join(changed[:5])}). "
            "Undo the change, or start a new run with encoder.checkpoint=RUN"
        )


def _log_to(run_dir: Path, rank: int) -> None:
    """Send the `vlx` log to the run's log.txt (log-rankN.txt on other processes)."""
    name = "log.txt" if rank == 0 else f"log-rank{rank}.txt"
    handler = logging.FileHandler(run_dir / name)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for old in [h for h in log.handlers if isinstance(h, logging.FileHandler)]:
        log.removeHandler(old)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
