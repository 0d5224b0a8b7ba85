"""One run from its directory to its results: what every process of a run executes."""

from __future__ import annotations

import json
import logging
import resource
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlx.core.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    ConfigError,
    Interrupted,
    StorageError,
    VlxError,
)
from vlx.core.files import write_json
from vlx.core.plain import PlainConsole
from vlx.core.results import Metric, Results
from vlx.data.config import DataConfig
from vlx.data.few_shot import FILE as SPLIT_FILE
from vlx.data.few_shot import Selected
from vlx.data.open import open_source
from vlx.data.training_data import keep_training_data
from vlx.engine import checkpoint, rundir
from vlx.engine.adapter import describe, load_adapter, save_adapter
from vlx.engine.build import build_method, build_pipeline, total_steps
from vlx.engine.classes import classes_of_checkpoint
from vlx.engine.config import RunConfig
from vlx.engine.environment import hardware
from vlx.engine.evaluate import Outcome, run_evaluators
from vlx.engine.evaluate_encoder import execute_evaluation
from vlx.engine.frozen_towers import keep_frozen
from vlx.engine.load import read_config, run_config
from vlx.engine.log import log_to
from vlx.engine.loop import Hooks, Trainer
from vlx.engine.parallel import Parallel
from vlx.engine.scored_samples import check_run
from vlx.engine.signals import StopRequest, stop_on_signals
from vlx.engine.text import make_tokenizer
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
        self.console = console or PlainConsole(quiet=not parallel.is_main)
        self.record = rundir.read_record(run_dir)
        self.track: Track = Fanout([])
        self.progress: ConsoleProgress | None = None
        log_to(run_dir, parallel.rank)

    def execute(self) -> int:
        """Train, evaluate, write results; keep `run.json` telling the truth throughout."""
        self._mark("running")
        code = 1
        try:
            trainer, untrained = self._prepare()
            trainer.fit()
            self._finish(trainer, untrained)
            self._mark("finished")
            code = EXIT_OK
        except Interrupted as reason:
            self._mark("interrupted", str(reason))
            self.console.print(
                f"Saved at step {self.record.step}. To go on: vlx resume {self.run_dir}",
                highlight=False,
                soft_wrap=True,
            )
            code = EXIT_INTERRUPTED
        except VlxError as error:
            code = error.exit_code
            self._mark_failed(str(error))
            raise
        except BaseException as error:
            self._mark_failed(f"{type(error).__name__}: {error}")
            raise
        finally:
            if self.progress is not None:
                self.progress.close()
            self.track.close(code)
        return code

    def _mark(self, state: str, message: str = "") -> None:
        self.record.state, self.record.message = state, message
        if self.parallel.is_main:
            self.record.write(self.run_dir)

    def _mark_failed(self, message: str) -> None:
        try:
            self._mark("failed", message)
        except StorageError:  # the disk is full: the first error is the one to show
            log.warning(f"run.json could not be updated: the run failed ({message})")

    def _prepare(self) -> tuple[Trainer, list[Metric]]:
        cfg, parallel = self.cfg, self.parallel
        snapshot = self._latest()
        source = open_source(cfg.data, cfg.data.train_split)
        if isinstance(source, Selected) and parallel.is_main:
            write_json(self.run_dir / SPLIT_FILE, source.record())
        source = classes_of_checkpoint(cfg, source)
        keep_training_data(self.run_dir, source.info, main=parallel.is_main)
        self.class_names = source.info.class_names
        self.eval_data = self.during_data = self._eval_data(cfg.data)
        if cfg.data.val_split is not None:
            self.during_data = self._eval_data(replace(cfg.data, test_split=cfg.data.val_split))
        self.on_training_data = check_run(cfg, source, self.eval_data, self.during_data)
        tokenizer = make_tokenizer(cfg.text, source, self.run_dir, main=parallel.is_main)
        method = build_method(cfg, source, tokenizer, load_weights=snapshot is None)
        frozen = keep_frozen(self.run_dir, method, snapshot, main=parallel.is_main)
        pipeline = build_pipeline(cfg, source, type(method), parallel, tokenizer)
        total = total_steps(cfg, pipeline.steps_per_epoch)
        start = snapshot.step if snapshot else 0
        self.record.total_steps, self.record.step = total, start
        self._open_track(start)
        self.progress = ConsoleProgress(self.console, f"{cfg.command} {cfg.slug}", start, total)
        hooks = Hooks(self._evaluate_during, self.track, self.progress, self.stop, self._saved)
        trainer = Trainer(
            cfg,
            method,
            pipeline,
            parallel,
            total_steps=total,
            run_dir=self.run_dir,
            hooks=hooks,
            saved_config=self.values,
            frozen=frozen,
        )
        self.method = method
        if method.frozen_base:
            if cfg.train.adapter is not None and snapshot is None:
                load_adapter(cfg.train.adapter, method, slug=cfg.slug)
            line = describe(method)
            log.info(line)
            self.console.print(line, highlight=False, soft_wrap=True)
        elif cfg.train.adapter is not None:
            raise ConfigError(f"train.adapter: {cfg.slug} trains its whole model here")
        untrained = self._untrained(trainer, snapshot)
        if snapshot is not None:
            trainer.restore(snapshot)
            log.info(f"resumed at step {start} of {total}")
        return trainer, untrained

    def _eval_data(self, data: DataConfig) -> EvalData:
        found = EvalData(
            data,
            self.cfg.eval,
            image_size=self.cfg.encoder.image_size,
            device=self.parallel.device,
            rank=self.parallel.rank,
            world=self.parallel.world,
        )
        found.use_classes(self.class_names, "the training split")
        return found

    def _latest(self) -> checkpoint.Snapshot | None:
        """The newest good checkpoint; refuses one of another configuration."""
        directory = self.run_dir / "checkpoints"
        if self.parallel.is_main:
            checkpoint.sweep(directory)
        found = checkpoint.latest(directory)
        if found is None:
            return None
        snapshot = checkpoint.load(found)
        rundir.check_same_config(snapshot.state["config"], self.values)
        return snapshot

    def _open_track(self, start: int) -> None:
        if not self.parallel.is_main:
            return
        sinks: list[Track] = [JsonlTrack(self.run_dir / "metrics.jsonl", start)]
        self.track = Fanout(sinks)
        if self.cfg.track.name is not Tracker.wandb:
            return
        try:
            from vlx.track.wandb import WandbTrack

            sinks.append(
                WandbTrack(
                    self.cfg.track,
                    run_dir=self.run_dir,
                    run_id=self.record.wandb_id,
                    sweep=self.record.sweep,
                    config=self.values,
                )
            )
        except Exception as error:  # no client, no network, bad key: the run goes on without
            log.warning(f"W&B is off for this run: {error}. track=none silences this")

    def _saved(self, step: int) -> None:
        self.record.step = step
        self.record.write(self.run_dir)

    def _subject(self) -> Subject:
        return Subject(self.cfg.slug, self.method.exports())

    def _evaluate_during(self, step: int) -> dict[str, float]:
        outcome = run_evaluators(
            self.cfg.eval.during,
            self._subject(),
            self.during_data,
            weights=self._weights(),
            pictures_dir=None,
        )
        return {metric.name: metric.value for metric in outcome.metrics}

    def _weights(self) -> str:
        if self.cfg.train.swad is not None:
            return "swad"
        return "trained" if self.cfg.train.ema_decay is None else "ema"

    def _evaluate_end(self, trainer: Trainer, weights: str) -> Outcome:
        return trainer.evaluate_with(
            lambda: run_evaluators(
                self.cfg.eval.at_end,
                self._subject(),
                self.eval_data,
                weights=weights,
                pictures_dir=self.run_dir / "pictures",
                main=self.parallel.is_main,
                between=self._stop_here,
            )
        )

    def _stop_here(self) -> None:
        """Between two evaluators: everything is saved, so a signal may end the run at once."""
        if self.parallel.flags(bool(self.stop))[0]:
            raise Interrupted(f"stopped by {self.stop.signal_name} during evaluation")

    def _untrained(self, trainer: Trainer, snapshot: checkpoint.Snapshot | None) -> list[Metric]:
        """What the model scores before training; measured once, read back on resume."""
        file = self.run_dir / _UNTRAINED
        if not self.cfg.eval.compare_untrained or not self.cfg.eval.at_end:
            return []
        if file.exists():
            return [Metric(**row) for row in json.loads(file.read_text())]
        if snapshot is not None:
            return []
        metrics = self._evaluate_end(trainer, "untrained").metrics
        if self.parallel.is_main:
            write_json(file, [asdict(metric) for metric in metrics])
        return metrics

    def _finish(self, trainer: Trainer, untrained: list[Metric]) -> None:
        trainer.hooks.console.close()
        outcome = self._evaluate_end(trainer, self._weights())
        step = trainer.progress.step
        weights = checkpoint.gather(self.method.state_dict(), keep=self.parallel.is_main)
        if not self.parallel.is_main:
            return
        if self.method.frozen_base:
            averaged = {} if trainer.average is None else trainer.average.shadow
            file = save_adapter(
                self.run_dir, self.method, {**weights, **averaged}, slug=self.cfg.slug
            )
            log.info(f"what was trained: {file}, {file.stat().st_size / 2**20:.2f} MiB")
        metrics = [*untrained, *outcome.metrics]
        self._write_results(trainer, metrics, outcome.counts, checkpoint.weights_checksum(weights))
        self.track.log(step, {f"eval/{m.name}": m.value for m in outcome.metrics})
        for picture in outcome.pictures:
            self.track.picture(step, f"pictures/{picture.stem}", picture)
        mark = " (training data)" if self.on_training_data else ""
        rows = [[m.name, m.weights, m.value, m.split + mark, m.protocol] for m in metrics]
        self.track.table(step, "results", ["metric", "weights", "value", "split", "protocol"], rows)

    def _write_results(
        self,
        trainer: Trainer,
        metrics: list[Metric],
        counts: dict[str, list[int]],
        checksum: str,
    ) -> None:
        cfg, pipeline = self.cfg, trainer.pipeline
        device = self.parallel.device
        if pipeline.tokenizer is not None:
            log.info(pipeline.caption_counts.line(pipeline.tokenizer.context_length))
            counts = {**counts, **pipeline.caption_counts.by_name()}
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
            counts=counts,
            bad_samples=len(pipeline.bad.reasons),
            hardware=hardware(str(device), self.parallel.world),
            versions=self.record.versions,
            commit=self.record.commit,
            wall_time_s=round(trainer.progress.seconds, 2),
            peak_memory_mb=round(peak, 1),
            finished=rundir.now(),
            pictures=[str(p.relative_to(self.run_dir)) for p in all_pictures],
            on_training_data=self.on_training_data,
        ).write(self.run_dir)
