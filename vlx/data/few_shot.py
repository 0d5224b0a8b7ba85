"""K samples a class, and the base and the new half of the classes: the splits of few-shot work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlx.core.errors import DataError
from vlx.data.config import Classes, DataConfig
from vlx.data.source import Sample, Source, SourceInfo
from vlx.data.subset import Subset

FILE = "split.json"
"""In a run directory: which samples it trained on."""


class Selected(Subset):
    """Chosen samples of a source; with a half of the classes, numbered from 0 in their order."""

    def __init__(self, source: Source, indices: np.ndarray, classes: range) -> None:
        super().__init__(source, indices)
        self._classes = classes

    @property
    def info(self) -> SourceInfo:
        whole = super().info
        names = whole.class_names[self._classes.start : self._classes.stop]
        return replace(whole, class_names=names)

    def read(self, index: int) -> Sample:
        sample = dict(super().read(index))
        sample["label"] -= self._classes.start
        return sample

    def labels(self) -> np.ndarray | None:
        labels = super().labels()
        return None if labels is None else labels - self._classes.start

    def record(self) -> dict[str, Any]:
        """What `data.split_file` of another run reads."""
        info = self._source.info
        return {
            "source": info.name,
            "fingerprint": info.fingerprint,
            "classes": list(info.class_names[self._classes.start : self._classes.stop]),
            "samples": self._indices.tolist(),
        }


def halves(num_classes: int) -> dict[Classes, range]:
    """CoOp's: the first half of the classes (the larger, where they are odd) is base, in the
    published order."""
    middle = -(-num_classes // 2)
    return {
        Classes.all: range(num_classes),
        Classes.base: range(middle),
        Classes.new: range(middle, num_classes),
    }


def select(source: Source, cfg: DataConfig, split: str) -> Source:
    """The part of a split that `data.classes`, `data.shots` and `data.split_file` choose.

    Shots and a split file concern the training split alone. Raises `DataError` for a class with
    too few samples, a source without labels, or a file that was made of other data.
    """
    few = split == cfg.train_split and (cfg.shots is not None or cfg.split_file is not None)
    if cfg.classes is Classes.all and not few:
        return source
    labels = source.labels()
    if labels is None:
        raise DataError(f"data.shots and data.classes need labels; {source.info.name} has none")
    classes = halves(source.info.num_classes)[cfg.classes]
    if not len(classes):
        raise DataError(f"data.classes={cfg.classes.name}: {source.info.name} has one class only")
    if few and cfg.split_file is not None:
        chosen = _from_file(Path(cfg.split_file).expanduser(), source)
    elif few:
        chosen = few_shots(labels, cfg.shots or 0, cfg.split_seed or 0, source.info, classes)
    else:
        chosen = np.arange(len(source))
    inside = (labels[chosen] >= classes.start) & (labels[chosen] < classes.stop)
    return Selected(source, chosen[inside], classes)


def few_shots(
    labels: np.ndarray, shots: int, seed: int, info: SourceInfo, classes: range
) -> np.ndarray:
    """Indices of `shots` samples of every class, ascending; fewer shots of a seed are part of more.

    labels: (N,), -1 where there is none.
    """
    import torch

    from vlx.core import random  # here: the command line lists sources without torch

    if shots < 1:
        raise DataError(f"data.shots={shots} must be at least 1")
    keys = random.key(torch.arange(len(labels)), seed, "shots")
    order = torch.argsort(random.uniform(keys, 1)[:, 0], stable=True).numpy()
    picked = []
    for number in classes:
        own = order[labels[order] == number]
        if len(own) < shots:
            raise DataError(
                f"data.shots={shots}: class '{info.class_names[number]}' of {info.name} has "
                f"{len(own)} samples in split '{info.split}': lower data.shots, or leave the "
                "class out of the data"
            )
        picked.append(own[:shots])
    return np.sort(np.concatenate(picked))


def _from_file(file: Path, source: Source) -> np.ndarray:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        samples = np.asarray(saved["samples"], dtype=np.int64)
        made_of = (saved["source"], saved["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.split_file: {file} is not a split of vlx: {error}") from error
    if made_of[1] != source.info.fingerprint:
        raise DataError(
            f"data.split_file: {file} was made of {made_of[0]} ({made_of[1]}), this data is "
            f"{source.info.name} ({source.info.fingerprint}): give the split.json of a run on "
            "this data and split"
        )
    if samples.ndim != 1 or ((samples < 0) | (samples >= len(source))).any():
        raise DataError(f"data.split_file: {file}: samples are no list of 0..{len(source) - 1}")
    return samples
