"""Refuses to score what was trained on, before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlx.core.errors import DataError
from vlx.data.config import DataConfig
from vlx.data.open import open_source
from vlx.data.overlap import training_samples
from vlx.data.source import Source
from vlx.data.training_data import TrainingData, read_training_data
from vlx.engine import rundir
from vlx.engine.config import RunConfig
from vlx.engine.load import from_dict, read_config
from vlx.evals.base import EvalData
from vlx.evals.registry import FITTED

log = logging.getLogger("vlx")


def check_run(cfg: RunConfig, train: Source, at_end: EvalData, during: EvalData) -> str:
    """What the results of a run on `train` say of training samples that it scores; empty for none.

    Raises:
        DataError: there are some, and nobody asked for that.
    """
    measures_during = bool(cfg.eval.during and (cfg.eval.every_epochs or cfg.eval.every_steps))
    if measures_during and cfg.data.val_split is not None:
        _check(during.source("test"), [train], "data.val_split", cfg.data)
    if not cfg.eval.at_end and not (measures_during and cfg.data.val_split is None):
        return ""
    return _check(at_end.source("test"), [train], "data.test_split", cfg.data)


def check_evaluation(cfg: RunConfig, data: EvalData) -> str:
    """The same of `vlx eval`: what an evaluator fits on, and what the run that is measured had.

    What that run itself started from is not looked at. Raises `DataError` as `check_run`.
    """
    fitted = [data.source("train")] if set(cfg.eval.at_end) & set(FITTED) else []
    test = data.source("test")
    said = _check(test, fitted, "data.test_split", cfg.data)
    run = Path(cfg.encoder.checkpoint or "").expanduser()
    if not (run / rundir.CONFIG_FILE).is_file():
        return said
    values, kept = read_config(run), read_training_data(run)
    if values["method"] is None or kept is None:
        return said
    train = _of_run(run, values, kept, test)
    name = f"{kept.name}/{kept.split}"
    return _check(test, train, "data.test_split", cfg.data, name) or said


def _of_run(run: Path, values: dict[str, Any], kept: TrainingData, test: Source) -> list[Source]:
    """What a run was trained on; where that is not here any more, its fingerprint must do."""
    if test.info.fingerprint == kept.fingerprint:
        return [test]
    own = from_dict(DataConfig, values["data"], "data.")
    try:
        return [open_source(own, own.train_split)]
    except DataError as error:
        log.warning(f"cannot tell whether {run} was trained on these samples: {error}")
        return []


def _check(
    test: Source, trained: Sequence[Source], key: str, cfg: DataConfig, name: str | None = None
) -> str:
    for train in trained:
        said = training_samples(test, train, key=key, allowed=cfg.test_on_train, name=name)
        if said:
            log.warning(f"{key}={test.info.split}: {said}")
            return said
    return ""
