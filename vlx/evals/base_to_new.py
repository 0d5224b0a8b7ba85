"""Generalisation from the classes that a prompt was trained on to those it never saw."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import numpy as np

from vlx.core.capability import OpenVocabulary
from vlx.data.class_names import Relabelled
from vlx.data.config import Classes
from vlx.data.open import open_source
from vlx.evals.base import EvalData, Evaluation, Subject
from vlx.evals.class_texts import class_words
from vlx.evals.classification import count_hits
from vlx.evals.tokens import Forward

log = logging.getLogger("vlx")


class BaseToNew:
    """Protocol base-to-new@2 (CoOp's and CoCoOp's): top-1 among the first half of the classes on
    their test images, top-1 among the second half on theirs, and their harmonic mean. The classes
    of the other half are not candidates. Classes of one name are one class."""

    name = "base-to-new"
    version = 2
    requires = (OpenVocabulary,)
    needs_labels = True
    needs_captions = False

    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        model = subject.get(OpenVocabulary)
        found: dict[str, float] = {}
        counted = 0
        for half in (Classes.base, Classes.new):
            source = open_source(replace(data.data, classes=half), data.data.test_split)
            words = class_words(source.info.class_names)
            names = list(dict.fromkeys(words))
            if len(names) < len(words):  # classes of one name cannot be told apart: they are one
                log.warning(f"base-to-new: {len(words)} classes have {len(names)} names")
                source = Relabelled(source, names, np.array([names.index(w) for w in words]))
            forward = Forward(partial(model.logits_of, class_names=names))
            hits = count_hits(forward, data.pipeline_of(source), len(names))
            found[half.name] = float(hits[:, 0].sum() / hits[:, 2].sum())
            counted += int(hits[:, 2].sum())
        base, new = found["base"], found["new"]
        found["harmonic-mean"] = 2 * base * new / (base + new) if base + new else 0.0
        info = open_source(replace(data.data, classes=Classes.all), data.data.test_split).info
        return Evaluation(metrics=found, split=f"{info.name}/{info.split}", num_samples=counted)
