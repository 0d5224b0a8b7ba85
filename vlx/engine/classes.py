"""The classes that a run was trained on, and data that has the same ones in its own order."""

from __future__ import annotations

from pathlib import Path

from vlx.core.capability import Budgets, Capability, ChannelSubsets, ClassLogits, ReducedTokens
from vlx.data.class_names import with_classes
from vlx.data.source import Source
from vlx.data.training_data import TrainingData, read_training_data
from vlx.engine.config import RunConfig
from vlx.evals.registry import evaluator

_WITH_HEAD: tuple[type[Capability], ...] = (ClassLogits, ChannelSubsets, ReducedTokens, Budgets)
_PRUNES = "prune-tokens"


def read_classes(checkpoint: str | None) -> TrainingData | None:
    """What the run of `encoder.checkpoint` was trained on, where it is a run that had classes."""
    run = Path(checkpoint or "").expanduser()
    found = read_training_data(run) if checkpoint is not None and run.is_dir() else None
    return found if found is not None and found.class_names else None


def reads_head(names: list[str]) -> bool:
    """Whether any of the evaluators measures a classifier's own head."""
    return any(kind in _WITH_HEAD for name in names for kind in evaluator(name).requires)


def classes_of_checkpoint(cfg: RunConfig, source: Source) -> Source:
    """The training data with its classes numbered as those of the run that it starts from.

    A head that is loaded from the run then means the same. Raises `DataError` where a classifier is
    to be pruned and the data has other classes; other commands train a head for theirs.
    """
    trained = read_classes(cfg.encoder.checkpoint)
    if trained is None or not source.info.class_names:
        return source
    same = set(source.info.class_names) == set(trained.class_names)
    if not same and cfg.command != _PRUNES:
        return source
    return with_classes(source, trained.class_names, f"the run {cfg.encoder.checkpoint}")
