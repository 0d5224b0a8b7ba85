"""Runs evaluators on what a method exports and files their numbers and pictures."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlx.core.errors import StorageError
from vlx.core.files import explain_write, write_atomic
from vlx.core.results import Metric
from vlx.evals.base import EvalData, Subject, absent, lacking
from vlx.evals.registry import evaluator

log = logging.getLogger("vlx")


@dataclass
class Outcome:
    """Metrics in the form of `results.json`, and the files of pictures."""

    metrics: list[Metric]
    pictures: list[Path]
    counts: dict[str, list[int]]
    """`<evaluator>/<what>` by layer."""


def run_evaluators(
    names: list[str],
    subject: Subject,
    data: EvalData,
    *,
    weights: str,
    pictures_dir: Path | None,
    main: bool = True,
    between: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run those of `names` that the subject and the data allow; say why the others did not run.

    between: called before each evaluator.
    """
    metrics: list[Metric] = []
    pictures: list[Path] = []
    counts: dict[str, list[int]] = {}
    subject.weights = weights
    for name in names:
        chosen = evaluator(name)
        capability = absent(chosen, subject)
        if capability:
            log.info(f"{name} not run: it needs {capability}, which {subject.name} does not export")
            continue
        missing = lacking(chosen, data.source("test"))
        if missing:
            log.info(f"{name} not run: {data.source('test').info.name} has no {missing}")
            continue
        between()
        found = chosen.run(subject, data)
        metrics += [
            Metric(
                name=f"{name}/{key}",
                value=value,
                unit=found.units.get(key, found.unit),
                split=found.split,
                num_samples=found.num_samples,
                protocol=f"{chosen.name}@{chosen.version}",
                weights=weights,
            )
            for key, value in found.metrics.items()
        ]
        counts |= {f"{name}/{key}": value for key, value in found.lists.items()}
        if pictures_dir is not None and main:
            pictures += _save_pictures(found.pictures, pictures_dir, weights)
    return Outcome(metrics, pictures, counts)


def _save_pictures(pictures: dict[str, Image.Image], folder: Path, weights: str) -> list[Path]:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(explain_write(error, folder)) from error
    files = []
    for title, picture in pictures.items():
        encoded = io.BytesIO()
        picture.save(encoded, "PNG")
        files.append(folder / f"{title}-{weights}.png")
        write_atomic(files[-1], encoded.getvalue())
    return files
