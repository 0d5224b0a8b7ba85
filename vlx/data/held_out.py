"""`NAME:train` and `NAME:test`: two parts of one split that no key value is on both sides of."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from vlx.core.errors import DataError
from vlx.data.captions import as_bytes, captioned
from vlx.data.config import DataConfig
from vlx.data.source import Source, SourceInfo
from vlx.data.subset import Subset

SIDES = ("train", "test")
_TEST_EVERY = 5


@runtime_checkable
class HasColumns(Protocol):
    """A source whose samples are rows of a table."""

    def column(self, name: str) -> Iterable[bytes | None]:
        """The values of a column, row by row, as the bytes of their text.

        Raises:
            DataError: there is no such column.
        """
        ...


class HeldOut(Subset):
    """The rows of `source` on one side, `train` or `test`.

    A hash of the value in `data.split_column`, or of the first caption, puts a fifth of the values
    on the test side. It looks at nothing else, so that a value is on the same side in every file:
    what is held out of one vendor's artwork is held out of another's too.
    """

    def __init__(self, source: Source, side: str, column: str | None) -> None:
        tests = np.array([zlib.crc32(key) % _TEST_EVERY == 0 for key in _keys(source, column)])
        super().__init__(source, np.flatnonzero(tests == (side == "test")))
        self._side = f":{side}"

    @property
    def info(self) -> SourceInfo:
        found = super().info
        return replace(found, split=found.split + self._side)


def split_name(cfg: DataConfig, split: str) -> tuple[str, str]:
    """`google:test` as the source's own word and the side, which is empty for the whole split.

    Raises:
        DataError: another word behind the colon, where there is a path; embedded sources have
            colons in words of their own.
    """
    name, colon, side = split.rpartition(":")
    if colon and name and side in SIDES:
        return name, side
    if colon and cfg.path is not None:
        raise DataError(
            f"data: split '{split}': what follows the colon is 'train' or 'test', as in all:train"
        )
    return split, ""


def whole_splits(cfg: DataConfig) -> DataConfig:
    """The config without sides: sources number their classes by the whole training split."""
    train, test = (split_name(cfg, split)[0] for split in (cfg.train_split, cfg.test_split))
    return replace(cfg, train_split=train, test_split=test)


def _keys(source: Source, column: str | None) -> Iterable[bytes]:
    if column is not None:
        if not isinstance(source, HasColumns):
            raise DataError(
                f"data.split_column={column}: {source.info.name} has no columns. "
                "Use data.split_column=null, which takes the caption"
            )
        for index, value in enumerate(source.column(column)):
            yield value if value is not None else source.describe(index).encode()
        return
    with_captions = captioned(source)
    if with_captions is None:
        raise DataError(
            f"data.split_column is missing: {source.info.name} has no captions to split by"
        )
    for index in range(len(source)):
        try:
            yield as_bytes(with_captions.captions(index)[0])
        except ValueError:  # reported when it is read; here it only must be on one side
            yield source.describe(index).encode("utf-8", "surrogateescape")
