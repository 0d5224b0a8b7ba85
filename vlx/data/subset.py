"""Some samples of a source, as a source."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlx.data.captions import HasTexts, Text
from vlx.data.content import combined
from vlx.data.overlap import contents_of
from vlx.data.source import Sample, Source, SourceInfo


class Subset:
    """The samples of `source` at `indices (K,)`, in that order, renumbered from 0."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source, self._indices = source, np.asarray(indices, dtype=np.int64)

    @property
    def info(self) -> SourceInfo:
        whole = self._source.info
        content = combined([whole.fingerprint, self._indices.tobytes()])
        return replace(whole, num_samples=len(self), fingerprint=content)

    @property
    def indices(self) -> np.ndarray:
        """(K,) int64: where each sample is in the whole source."""
        return self._indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Sample:
        return self._source.read(int(self._indices[index]))

    def captions(self, index: int) -> list[str]:
        """As `Captioned`; only where the source is."""
        return self._source.captions(int(self._indices[index]))  # type: ignore[attr-defined]

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))

    def labels(self) -> np.ndarray | None:
        labels = self._source.labels()
        return None if labels is None else labels[self._indices]

    def domains(self) -> np.ndarray:
        """As `WithDomains`; only where the source is."""
        return self._source.domains()[self._indices]  # type: ignore[attr-defined]

    def contents(self) -> np.ndarray | None:
        """As `HasContents`; None where the source does not know."""
        whole = contents_of(self._source)
        return None if whole is None else whole[self._indices]

    def texts(self, index: int) -> list[Text]:
        """The captions as they are stored, where the source can show them."""
        if isinstance(self._source, HasTexts):
            return self._source.texts(int(self._indices[index]))
        return [*self.captions(index)]


def evenly(source: Source, count: int) -> Subset:
    """At most `count` samples, spread evenly over a source's order."""
    picked = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(np.int64)
    return Subset(source, picked)
