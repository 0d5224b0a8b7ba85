"""Several sources one after the other as one, each of them a domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain

import numpy as np

from vlx.core.errors import DataError
from vlx.data.cache import digest
from vlx.data.overlap import contents_of
from vlx.data.source import Sample, Source


class Joined:
    """The samples of the `sources`, in their order, numbered through.

    Raises `DataError` where their fields or classes differ: a label would mean several things.
    """

    def __init__(self, sources: Mapping[str, Source], name: str) -> None:
        self._sources = list(sources.values())
        first = self._sources[0].info
        for domain, source in sources.items():
            own = source.info
            if (own.fields, own.class_names) != (first.fields, first.class_names):
                raise DataError(
                    f"{own.name} ({domain}) has other classes or fields than {first.name}: folders "
                    "that are joined by + need the same ones"
                )
        sizes = [len(source) for source in self._sources]
        self._ends = np.cumsum(sizes)
        self._domains = np.repeat(np.arange(len(sizes)), sizes)
        self.info = replace(
            first,
            name=name,
            split="+".join(sources),
            num_samples=sum(sizes),
            fingerprint=digest(*(source.info.fingerprint for source in self._sources)),
            domain_names=tuple(sources),
        )

    def __len__(self) -> int:
        return len(self._domains)

    def _find(self, index: int) -> tuple[Source, int]:
        number = int(self._domains[index])
        return self._sources[number], index - int(self._ends[number]) + len(self._sources[number])

    def read(self, index: int) -> Sample:
        source, place = self._find(index)
        return source.read(place)

    def describe(self, index: int) -> str:
        source, place = self._find(index)
        return source.describe(place)

    def labels(self) -> np.ndarray | None:
        found = [own for source in self._sources if (own := source.labels()) is not None]
        return np.concatenate(found) if len(found) == len(self._sources) else None

    def domains(self) -> np.ndarray:
        """(N,) int64: every sample's domain, a place in `info.domain_names`."""
        return self._domains

    def contents(self) -> np.ndarray | None:
        """As `HasContents`; None where one of the sources does not know."""
        found = [own for source in self._sources if (own := contents_of(source)) is not None]
        return np.concatenate(found) if len(found) == len(self._sources) else None

    def column(self, name: str) -> Iterable[bytes | None]:
        """As `held_out.HasColumns`; only where the sources are."""
        return chain.from_iterable(source.column(name) for source in self._sources)  # type: ignore[attr-defined]
