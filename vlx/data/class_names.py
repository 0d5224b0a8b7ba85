"""Classes are matched by their names: a number means something only beside the names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlx.core.errors import DataError, nearest
from vlx.data.source import Sample, Source, SourceInfo
from vlx.data.subset import Subset

_SHOWN = 5


class Relabelled(Subset):
    """A source whose class `i` has the number `place[i]` and the name `names[place[i]]`."""

    def __init__(self, source: Source, names: Sequence[str], place: np.ndarray) -> None:
        super().__init__(source, np.arange(len(source)))
        self._names, self._place = tuple(names), place

    @property
    def info(self) -> SourceInfo:
        return replace(self._source.info, class_names=self._names)

    def read(self, index: int) -> Sample:
        sample = dict(super().read(index))
        if "label" in sample:
            sample["label"] = int(self._place[sample["label"]])
        return sample

    def labels(self) -> np.ndarray | None:
        labels = super().labels()
        return None if labels is None else np.where(labels < 0, labels, self._place[labels])


def places(names: Sequence[str], wanted: Sequence[str], *, who: str, whose: str) -> np.ndarray:
    """`(C,)` int64: the place in `wanted` of each name.

    Raises:
        DataError: a name that `wanted` lacks, or that stands in either twice in another order.
    """
    new = [name for name in names if name not in set(wanted)]
    if new:
        raise DataError(
            f"{who} has classes that {whose} lacks: {_some(new)}. {nearest(new[0], wanted)}"
        )
    if tuple(names) == tuple(wanted):
        return np.arange(len(names))
    if len(set(names)) < len(names) or len(set(wanted)) < len(wanted):
        raise DataError(f"{who}: two classes have one name, so that names do not tell them apart")
    number = {name: i for i, name in enumerate(wanted)}
    return np.array([number[name] for name in names], dtype=np.int64)


def as_training(
    labels: np.ndarray, names: tuple[str, ...], train: tuple[str, ...], split: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and names as the training split, whose names are `train`, numbers them.

    Raises:
        DataError: a name that the training split lacks.
    """
    if not train or train == names:
        return labels, names
    place = places(names, train, who=f"split '{split}'", whose="the training split")
    return np.where(labels < 0, labels, place[labels]), train


def written_names(folder: Path, count: int) -> tuple[str, ...]:
    """Class names from `classnames.txt` in a folder or above it, a line each, where it fits."""
    for file in (folder / "classnames.txt", folder.parent / "classnames.txt"):
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            if len(lines) >= count:
                return tuple(lines)
    return ()


def with_classes(source: Source, wanted: Sequence[str], whose: str) -> Source:
    """The source with the classes of a run, in the run's order.

    Raises:
        DataError: another set of classes, with what is missing and what is new.
    """
    info = source.info
    if tuple(info.class_names) == tuple(wanted):
        return source
    who = f"{info.name}/{info.split}"
    if len(info.class_names) != len(wanted):
        raise DataError(
            f"{who} has {len(info.class_names)} classes, {whose} has {len(wanted)}: "
            f"{_difference(info.class_names, wanted)}"
        )
    if set(info.class_names) != set(wanted):
        raise DataError(
            f"{who} has other classes than {whose}: {_difference(info.class_names, wanted)}. "
            "data.class_names=FILE gives the classes other names"
        )
    return Relabelled(source, wanted, places(info.class_names, wanted, who=who, whose=whose))


def renamed(source: Source, file: Path) -> Source:
    """The source with the names of a file, and in its order: `data.class_names`.

    A line for each class: its name. Where the lines are the source's own names, they give the order
    alone; else line `i` names class `i`. `OWN<tab>NAME` on every line says which is which.

    Raises:
        DataError: the file cannot be read, or does not name every class once.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"data.class_names: {file} cannot be read: {error}") from error
    lines = [line for line in lines if line]
    own, count = source.info.class_names, source.info.num_classes
    if len(lines) != count:
        raise DataError(
            f"data.class_names: {file} has {len(lines)} names, {source.info.name} has {count} "
            "classes: give a line for each"
        )
    pairs = [line.split("\t", 1) for line in lines]
    if all(len(pair) == 2 for pair in pairs):
        order, names = [pair[0].strip() for pair in pairs], [pair[1].strip() for pair in pairs]
    else:
        order, names = (lines if set(lines) == set(own) else list(own)), lines
    who, whose = source.info.name, f"data.class_names={file}"
    return Relabelled(source, names, places(own, order, who=who, whose=whose))


def _difference(names: Sequence[str], wanted: Sequence[str]) -> str:
    missing = [name for name in wanted if name not in set(names)]
    new = [name for name in names if name not in set(wanted)]
    return f"missing {_some(missing)}; new {_some(new)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more
