"""scikit-learn's handwritten digits: 1797 real scans of 8x8 pixels, installed with it."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from vlx.core.errors import DataError
from vlx.data.config import DataConfig
from vlx.data.content import combined
from vlx.data.overlap import image_digests
from vlx.data.source import Sample, SourceInfo

_TEST_EVERY = 5  # every fifth scan is the test split: 359 of 1797


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    # Read from the package's file: importing sklearn costs over a second of start-up.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn")
    file = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(file, "rt") as stream:
        rows = np.loadtxt(stream, delimiter=",", dtype=np.int64)
    grey = (rows[:, :-1] * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8)
    return np.repeat(grey[..., None], 3, axis=3), rows[:, -1]


class Digits:
    """Splits `train` (1437), `test` (360) and `all`."""

    def __init__(self, cfg: DataConfig, split: str) -> None:
        images, labels = _read_digits()
        test = np.arange(len(labels)) % _TEST_EVERY == 0
        chosen = {"train": ~test, "test": test, "all": np.ones_like(test)}.get(split)
        if chosen is None:
            raise DataError(f"digits has no split '{split}': use train, test or all")
        self._images, self._labels = images[chosen], labels[chosen]
        self._ids = np.flatnonzero(chosen)
        self.info = SourceInfo(
            name="digits",
            split=split,
            num_samples=len(self._labels),
            fields=("image", "label"),
            class_names=tuple(str(digit) for digit in range(10)),
            fingerprint=combined([self._images.tobytes(), self._labels.tobytes()]),
            mirror_safe=False,
        )

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Sample:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        return f"digits row {self._ids[index]}"

    def contents(self) -> np.ndarray:
        """(N, 32) uint8: digests of the pixels."""
        return image_digests(image.tobytes() for image in self._images)

    def labels(self) -> np.ndarray:
        return self._labels
