"""`vlx eval`: evaluators on a plain encoder, without a method and without training."""

from __future__ import annotations

import inspect
import json
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlx.core import registry
from vlx.core.capability import ImageFeatures, OpenVocabulary
from vlx.core.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    CheckpointError,
    ConfigError,
    DataError,
    VlxError,
)
from vlx.core.results import Results
from vlx.data.cache import digest
from vlx.encoders.base import EncoderFeatures
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.checkpoint import read_weights
from vlx.engine import rundir
from vlx.engine.build import builder_of
from vlx.engine.checkpoint import weights_checksum
from vlx.engine.classes import read_classes, reads_head
from vlx.engine.config import RunConfig
from vlx.engine.environment import hardware
from vlx.engine.evaluate import Outcome, run_evaluators
from vlx.engine.load import from_dict, read_config, run_config
from vlx.engine.log import log_to
from vlx.engine.parallel import Parallel
from vlx.engine.scored_samples import check_evaluation
from vlx.engine.text import run_tokenizer
from vlx.evals.base import EvalData, Subject, absent, lacking
from vlx.evals.feature_cache import FeatureCache
from vlx.evals.registry import EVALUATORS, evaluator


def execute_evaluation(run_dir: Path, values: dict[str, Any]) -> int:
    """Evaluate as a run directory's config says and write its results. Returns an exit code.

    Raises `VlxError` for what the user can mend; `run.json` then says failed, with the reason.
    """
    cfg = from_dict(RunConfig, values)
    parallel = Parallel(cfg.train, cfg.launcher)
    try:
        with rundir.locked(run_dir) if parallel.is_main else nullcontext():
            return _execute(run_dir, cfg, parallel)
    finally:
        parallel.close()


def _execute(run_dir: Path, cfg: RunConfig, parallel: Parallel) -> int:
    record = rundir.read_record(run_dir)
    log_to(run_dir, parallel.rank)

    def mark(state: str, message: str = "") -> None:
        record.state, record.message = state, message
        if parallel.is_main:
            record.write(run_dir)

    mark("running")
    try:
        _evaluate(run_dir, cfg, parallel, record)
    except KeyboardInterrupt:
        mark("interrupted")
        return EXIT_INTERRUPTED
    except VlxError as error:
        mark("failed", str(error))
        raise
    except BaseException as error:
        mark("failed", f"{type(error).__name__}: {error}")
        raise
    mark("finished")
    return EXIT_OK


def _check_capabilities(names: list[str], subject: Subject) -> None:
    """Raise `ConfigError` for an evaluation that was asked for and cannot be."""
    for name in names:
        capability = absent(evaluator(name), subject)
        if capability:
            able = [other for other in EVALUATORS if not absent(evaluator(other), subject)]
            raise ConfigError(
                f"{name} needs {capability}, which {subject.name} does not export; it can "
                f"be evaluated by {', '.join(able)}"
            )


def _evaluate(run_dir: Path, cfg: RunConfig, parallel: Parallel, record: rundir.RunRecord) -> None:
    started = time.monotonic()
    data = EvalData(
        cfg.data,
        cfg.eval,
        image_size=cfg.encoder.image_size,
        device=parallel.device,
        rank=parallel.rank,
        world=parallel.world,
    )
    info = data.source("test").info
    for name in cfg.eval.at_end:
        missing = lacking(evaluator(name), data.source("test"))
        if missing:
            raise DataError(f"{info.name} has no {missing}, which {name} needs")
    on_training_data = check_evaluation(cfg, data)
    subject, module = _with_classes(cfg, data)
    info = data.source("test").info
    _check_capabilities(cfg.eval.at_end, subject)
    checksum = weights_checksum(module.state_dict())
    module.to(parallel.device).eval()
    if cfg.eval.cache_features:
        identity = _identity(cfg, module, checksum, info.class_names, record, parallel)
        subject.cache = FeatureCache(identity, rank=parallel.rank, world=parallel.world)
    outcome = run_evaluators(
        cfg.eval.at_end,
        subject,
        data,
        weights="trained",
        pictures_dir=run_dir / "pictures",
        main=parallel.is_main,
    )
    if parallel.is_main:
        results = _results(run_dir, cfg, record, outcome)
        results.weights_checksum = checksum
        results.data_fingerprint = info.fingerprint
        results.bad_samples = data.num_bad
        results.on_training_data = on_training_data
        results.hardware = hardware(str(parallel.device), parallel.world)
        results.wall_time_s = round(time.monotonic() - started, 2)
        results.write(run_dir)


def _with_classes(cfg: RunConfig, data: EvalData) -> tuple[Subject, nn.Module]:
    """The subject, its head's classes matched by name with those of the data.

    A model that classifies among any names takes the data's where they are others. Raises
    `DataError` where a head of other classes would be measured.
    """
    info = data.source("test").info
    trained = read_classes(cfg.encoder.checkpoint)
    if trained is None or not info.class_names or not reads_head(cfg.eval.at_end):
        return build_subject(cfg, info.num_classes, info.class_names)
    names = trained.class_names
    subject, module = build_subject(cfg, len(names), names)
    if subject.has(OpenVocabulary) and set(names) != set(info.class_names):
        return build_subject(cfg, info.num_classes, info.class_names)
    data.use_classes(names, f"the run {cfg.encoder.checkpoint}")
    data.source("test")  # refused before anything is computed
    return subject, module


def _identity(
    cfg: RunConfig,
    module: nn.Module,
    checksum: str,
    class_names: tuple[str, ...],
    record: rundir.RunRecord,
    parallel: Parallel,
) -> str:
    """Digest of all that features come from besides the data: the weights, what the configurations
    say of the model, the kind of device, and the code, which nobody gives a new version for every
    change."""
    run = Path(cfg.encoder.checkpoint or "").expanduser()
    is_run = (run / rundir.CONFIG_FILE).is_file()
    described = {
        "encoder": asdict(cfg.encoder) | {"checkpoint": None},
        "run": read_config(run) if is_run else None,
        "device": parallel.device.type,
        "classes": class_names,
        "versions": record.versions,
    }
    package = Path(inspect.getfile(registry)).parent.parent
    own = sys.modules[type(module).__module__].__file__  # a plugin's is elsewhere
    files = [*sorted(package.rglob("*.py")), *([Path(own)] if own else [])]
    code = digest(*(file.read_text(encoding="utf-8") for file in files))
    return digest(checksum, code, json.dumps(described, sort_keys=True, default=str))


def _results(run_dir: Path, cfg: RunConfig, record: rundir.RunRecord, outcome: Outcome) -> Results:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return Results(
        run=run_dir.name,
        command=cfg.command,
        method=cfg.slug,
        preset=cfg.preset,
        seed=cfg.seed,
        config_hash=record.config_hash,
        data_fingerprint="",
        weights_checksum="",
        steps=0,
        epochs=0.0,
        final_losses={},
        metrics=outcome.metrics,
        counts=outcome.counts,
        bad_samples=0,
        hardware={},
        versions=record.versions,
        commit=record.commit,
        wall_time_s=0.0,
        peak_memory_mb=round(peak, 1),
        finished=rundir.now(),
        pictures=[str(picture.relative_to(run_dir)) for picture in outcome.pictures],
    )


def build_subject(
    cfg: RunConfig,
    num_classes: int,
    class_names: tuple[str, ...] = (),
    *,
    load_weights: bool = True,
) -> tuple[Subject, nn.Module]:
    """What `encoder.checkpoint` holds, for the evaluators of `eval.at_end`.

    num_classes, class_names: of the data, for a run's classifier.

    A plain encoder where its features are enough. An evaluator that needs more of a method (a
    decoder that repaints) takes the whole method of a run directory.
    """
    path = cfg.encoder.checkpoint
    if path is None:
        raise ConfigError("encoder.checkpoint is null: give a run directory or a file")
    if all(kind is ImageFeatures for name in cfg.eval.at_end for kind in evaluator(name).requires):
        builder = EncoderBuilder({"encoder": cfg.encoder}, num_classes=0, load_weights=load_weights)
        encoder = builder.vision("encoder", arguments=_own_arguments(cfg.encoder.name, path))
        return Subject(path, (EncoderFeatures(encoder),)), encoder
    run = Path(path).expanduser()
    if not (run / rundir.CONFIG_FILE).is_file():
        names = ", ".join(cfg.eval.at_end)
        raise CheckpointError(
            f"{names} needs more than an encoder: give a run directory, not {path}"
        )
    trained = run_config(read_config(run))
    trained.encoder = replace(cfg.encoder, checkpoint=None)
    tokenizer = run_tokenizer(trained.text, run)
    builder = builder_of(trained, num_classes, tokenizer, class_names, load_weights=False)
    method = registry.load(trained.slug)(trained.method, builder)
    if load_weights:
        try:
            method.load_state_dict(read_weights(run))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{run} does not fit its method: {reason[:300]}") from error
    return Subject(trained.slug, method.exports()), method


def _own_arguments(name: str, path: str) -> Mapping[str, Any]:
    """What the method of a run gave the encoder `name`, where `path` is such a run."""
    run = Path(path).expanduser()
    if not (run / rundir.CONFIG_FILE).is_file():
        return {}
    trained = run_config(read_config(run))
    if trained.encoder.name != name:
        return {}
    return registry.load(trained.slug).encoder_arguments(trained.method)
