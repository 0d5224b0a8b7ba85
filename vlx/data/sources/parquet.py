"""Parquet and Arrow files with an image column, through Hugging Face `datasets`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from vlx.core.errors import DataError, nearest
from vlx.data.config import DataConfig
from vlx.data.source import Sample, SourceInfo

_SUFFIXES = (".parquet", ".arrow")


class Parquet:
    """`path` is a file, or a folder whose files are named after their split (train*.parquet)."""

    def __init__(self, cfg: DataConfig, split: str) -> None:
        import datasets

        files = _files(cfg.path, split)
        kind = "parquet" if files[0].suffix == ".parquet" else "arrow"
        datasets.disable_progress_bars()
        table = datasets.load_dataset(kind, data_files=[str(f) for f in files], split="train")
        for column in (cfg.image_column,):
            if column not in table.column_names:
                raise DataError(
                    f"data.image_column: {files[0]} has no column '{column}'. "
                    f"{nearest(column, table.column_names)}"
                )
        features = table.features
        if isinstance(features[cfg.image_column], datasets.Image):
            table = table.cast_column(cfg.image_column, datasets.Image(decode=False))
        has_labels = cfg.label_column in table.column_names
        label_feature = features.get(cfg.label_column)
        self._labels = np.asarray(table[cfg.label_column]) if has_labels else None
        names: tuple[str, ...] = ()
        if isinstance(label_feature, datasets.ClassLabel):
            names = tuple(label_feature.names)
        elif self._labels is not None:
            values, self._labels = np.unique(self._labels, return_inverse=True)
            names = tuple(str(value) for value in values)
        self._table = table
        self._image_column = cfg.image_column
        self._files = files
        self.info = SourceInfo(
            name=files[0].parent.name
            if len(files) > 1
            else f"{files[0].parent.name}/{files[0].stem}",
            split=split,
            num_samples=len(table),
            fields=("image", "label") if has_labels else ("image",),
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
        return f"{self._files[0].parent} row {index}"

    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.astype(np.int64)


def _files(path: str | None, split: str) -> list[Path]:
    if path is None:
        raise DataError("data.path is missing: a Parquet or Arrow file, or a folder of them")
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"data.path: {root} does not exist")
    files = sorted(f for f in root.rglob("*") if f.suffix in _SUFFIXES)
    chosen = [f for f in files if f.stem.startswith(split) or f.parent.name == split]
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
