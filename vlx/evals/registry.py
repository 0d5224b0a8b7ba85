"""Evaluators by name, imported when used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vlx.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from vlx.evals.base import Evaluator

# name -> (module, class, what it measures)
EVALUATORS: dict[str, tuple[str, str, str]] = {
    "knn": ("knn", "Knn", "k-nearest-neighbour accuracy of frozen features"),
    "linear-probe": ("probe", "LinearProbe", "logistic regression on frozen features"),
    "classification": ("classification", "Classification", "accuracy of a classifier's own head"),
    "base-to-new": ("base_to_new", "BaseToNew", "accuracy on trained and on unseen classes"),
    "channels": ("channels", "ChannelAccuracy", "accuracy with some of the input's channels"),
    "shifts": ("shifts", "ShiftConsistency", "whether shifted images get the same class"),
    "tokens": ("tokens", "TokenCosts", "GMACs, images/s and memory with fewer tokens"),
    "budgets": ("budgets", "BudgetCurve", "accuracy and cost of one model at each budget"),
    "reconstruction": ("reconstruction", "ReconstructionGrid", "a picture of repainted images"),
    "zero-shot": ("zero_shot", "ZeroShot", "accuracy of classes named in words"),
    "retrieval": ("retrieval", "Retrieval", "finding images by captions and captions by images"),
    "caption": ("caption", "CaptionQuality", "BLEU, ROUGE-L and CIDEr of captions"),
}

FITTED = ("knn", "linear-probe")
"""Evaluators that fit on the training split of the data, whatever the weights were trained on."""


def evaluator(name: str) -> Evaluator:
    """The evaluator of a name; an unknown one raises `ConfigError` with the nearest."""
    if name not in EVALUATORS:
        raise ConfigError(f"no evaluation '{name}'. {nearest(name, EVALUATORS)}")
    module, cls, _ = EVALUATORS[name]
    return getattr(importlib.import_module(f"vlx.evals.{module}"), cls)()
