"""Parquet and Arrow files with an image column, through Hugging Face `datasets`."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlx.core.errors import DataError, nearest
from vlx.data.config import DataConfig
from vlx.data.labels import class_indices
from vlx.data.source import Sample, SourceInfo

if TYPE_CHECKING:
    import datasets

log = logging.getLogger("vlx")
_SUFFIXES = (".parquet", ".arrow")


class Parquet:
    """Parquet or Arrow files, or a folder that `datasets.save_to_disk` wrote.

    `path` is a file, or a folder whose files are named after their split (`train.parquet`,
    `train-00000-of-00002.parquet`, `train/0.parquet`). A single file serves every split.
    """

    def __init__(self, cfg: DataConfig, split: str) -> None:
        import datasets

        datasets.disable_progress_bars()
        table, files = _open(cfg.path, split)
        _check_columns(cfg, table, files[0])
        if isinstance(table.features[cfg.image_column], datasets.Image):
            table = table.cast_column(cfg.image_column, datasets.Image(decode=False))
        self._labels: np.ndarray | None = None
        names: tuple[str, ...] = ()
        if cfg.label_column in table.column_names:
            labels, names = _labels(cfg, table, split)
            if (labels >= 0).any():  # a test split whose labels are withheld has -1 everywhere
                self._labels = labels
            else:
                names = ()
        self._table = table
        self._image_column = cfg.image_column
        self._where = files[0] if len(files) == 1 else files[0].parent
        self.info = SourceInfo(
            name=files[0].parent.name
            if len(files) > 1
            else f"{files[0].parent.name}/{files[0].stem}",
            split=split,
            num_samples=len(table),
            fields=("image", "label") if self._labels is not None else ("image",),
            class_names=names,
            fingerprint=_fingerprint(files),
        )

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> Sample:
        row = self._table[index]
        image = row[self._image_column]
        if isinstance(image, dict):
            data = image["bytes"]
            image = data if data is not None else Path(image["path"]).read_bytes()
        sample: Sample = {"image": image}
        if self._labels is not None:
            sample["label"] = int(self._labels[index])
        return sample

    def describe(self, index: int) -> str:
        return f"{self._where} row {index}"

    def labels(self) -> np.ndarray | None:
        return self._labels


def _open(path: str | None, split: str) -> tuple[datasets.Dataset, list[Path]]:
    import datasets

    if path is None:
        raise DataError("data.path is missing: a Parquet or Arrow file, or a folder of them")
    root = Path(path).expanduser()
    for saved in (root / split, root):
        if (saved / "state.json").is_file():
            table = datasets.load_from_disk(str(saved))
            assert isinstance(table, datasets.Dataset)
            return table, sorted(saved.glob("*.arrow"))
    if (root / "dataset_dict.json").is_file():
        splits = json.loads((root / "dataset_dict.json").read_text())["splits"]
        raise DataError(f"{root} has no split '{split}'. {nearest(split, splits)}")
    files = _files(root, split)
    kind = "parquet" if files[0].suffix == ".parquet" else "arrow"
    names = [str(file) for file in files if file.suffix == files[0].suffix]
    try:
        table = datasets.load_dataset(kind, data_files=names, split="train")
    except Exception as error:  # pyarrow's and datasets' own kinds for files that are not theirs
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{root}: cannot read split '{split}': {reason}") from error
    assert isinstance(table, datasets.Dataset)
    return table, files


def _check_columns(cfg: DataConfig, table: datasets.Dataset, file: Path) -> None:
    columns = table.column_names
    if cfg.image_column not in columns:
        raise DataError(
            f"data.image_column: {file} has no column '{cfg.image_column}'. "
            f"{nearest(cfg.image_column, columns)}"
        )
    if cfg.label_column in columns:
        return
    hint = nearest(cfg.label_column, columns)
    if cfg.label_column != DataConfig.label_column:
        raise DataError(f"data.label_column: {file} has no column '{cfg.label_column}'. {hint}")
    log.warning(f"{file} has no column 'label': its images have no labels. {hint}")


def _labels(
    cfg: DataConfig, table: datasets.Dataset, split: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    import datasets

    feature = table.features[cfg.label_column]
    values = np.asarray(table[cfg.label_column])
    if isinstance(feature, datasets.ClassLabel):
        return values.astype(np.int64), tuple(feature.names)
    if values.ndim != 1 or values.dtype.kind not in "iubUS":
        raise DataError(
            f"data.label_column={cfg.label_column} holds {values.dtype} of shape "
            f"{values.shape[1:]} or missing values; a label is a whole number or a word"
        )
    train = values
    if split != cfg.train_split:
        with suppress(DataError):  # without a training split, this one numbers its own
            train = np.asarray(_open(cfg.path, cfg.train_split)[0][cfg.label_column])
    return class_indices(values, train, split)


def _files(root: Path, split: str) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"data.path: {root} does not exist")
    files = sorted(f for f in root.rglob("*") if f.suffix in _SUFFIXES)
    named = re.compile(rf"{re.escape(split)}([-_.].*)?$")
    chosen = [f for f in files if named.match(f.stem) or f.parent.name == split]
    if not chosen:
        found = ", ".join(f.name for f in files[:5]) or "no Parquet or Arrow file"
        raise DataError(f"{root} has no file for split '{split}' (found: {found})")
    return chosen


def _fingerprint(files: list[Path]) -> str:
    """Digest of names, sizes and last 64 KiB: Parquet's footer holds sizes and statistics."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            stream.seek(max(0, size - 65536))
            digest.update(stream.read())
    return digest.hexdigest()[:16]
