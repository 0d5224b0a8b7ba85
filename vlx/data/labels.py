"""Class indices from what a data set writes in its label column."""

from __future__ import annotations

import numpy as np

from vlx.core.errors import DataError
from vlx.data.source import Source

_MOST_CLASSES = 100_000


def class_indices(
    values: np.ndarray, train_values: np.ndarray, split: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """`(N,)` int64 labels and the class names, the same for every split of a data set.

    Whole numbers from 0 are class indices as they stand. Anything else (words, sparse ids) is
    numbered in the sorted order of the training split.

    Raises:
        DataError: a value that the training split does not have.
    """
    known = np.unique(train_values)
    if values.dtype.kind in "iu" and known.dtype.kind in "iu" and len(known):
        low = min(int(known[0]), int(values.min(initial=0)))
        high = int(known[-1])
        if low >= 0 and high < _MOST_CLASSES and int(values.max(initial=0)) <= high:
            return values.astype(np.int64), tuple(str(i) for i in range(high + 1))
    new = np.setdiff1d(values, known)
    if len(new):
        shown = ", ".join(str(value) for value in new[:5])
        raise DataError(
            f"split '{split}' has labels that the training split lacks: {shown}: leave these "
            "samples out, or add the classes to the training split"
        )
    return np.searchsorted(known, values).astype(np.int64), tuple(str(value) for value in known)


def check_labels(source: Source) -> None:
    """Raise `DataError` for a label that is no class: beyond their number, or below -1 (none)."""
    labels, count = source.labels(), source.info.num_classes
    if labels is None:
        return
    wrong = np.flatnonzero((labels < -1) | (labels >= count))
    if len(wrong):
        raise DataError(
            f"{source.info.name}: {len(wrong)} of {len(labels)} samples have a label beyond its "
            f"{count} classes (first: {source.describe(int(wrong[0]))} has {labels[wrong[0]]}, "
            f"classes are 0..{count - 1}): correct the labels, or the names of the classes"
        )
