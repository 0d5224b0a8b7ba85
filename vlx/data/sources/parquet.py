"""Parquet and Arrow files with an image column, through Hugging Face `datasets`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vlx.core.errors import DataError, nearest
from vlx.data.captions import Text, as_texts, clean
from vlx.data.class_names import as_training
from vlx.data.config import DataConfig
from vlx.data.content import files_fingerprint
from vlx.data.labels import class_indices
from vlx.data.source import Sample, SourceInfo
from vlx.data.split_hint import split_hint

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

log = logging.getLogger("vlx")
_SUFFIXES = (".parquet", ".arrow")
_ROWS = 1000  # of a column, read together


class Parquet:
    """Parquet or Arrow files, or a folder that `datasets.save_to_disk` wrote.

    `path` is a file, or a folder whose files are named after their split (`train.parquet`,
    `train-00000-of-00002.parquet`, `train/0.parquet`). A single file serves every split. The column
    of captions holds a text or a list of texts, and is read row by row when it is asked for.
    """

    def __init__(self, cfg: DataConfig, split: str) -> None:
        import datasets

        datasets.disable_progress_bars()
        table, files = _open(cfg, split)
        captions = _check_columns(cfg, table, files[0])
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
        self._images = table.select_columns([cfg.image_column])
        self._image_column, self._caption_column = cfg.image_column, captions
        self._where = files[0] if len(files) == 1 else files[0].parent
        self.info = SourceInfo(
            name=files[0].parent.name
            if len(files) > 1
            else f"{files[0].parent.name}/{files[0].stem}",
            split=split,
            num_samples=len(table),
            fields=(
                "image",
                *(["label"] if self._labels is not None else []),
                *(["caption"] if captions else []),
            ),
            class_names=names,
            fingerprint=_fingerprint(files, self._images, cfg.image_column),
            mirror_safe=cfg.mirror_safe,
            extra={"image": cfg.image_column},
        )
        if captions:
            self._texts = table.select_columns([captions]).with_format("arrow")
            _warn_of_empty(files[0], self._texts.data.column(captions))

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> Sample:
        image = self._images[index][self._image_column]
        if isinstance(image, dict):
            data, path = image["bytes"], image["path"]
            image = data if data is not None or path is None else Path(path).read_bytes()
        if image is None:
            raise ValueError("no image")
        sample: Sample = {"image": image}
        if self._labels is not None:
            sample["label"] = int(self._labels[index])
            if sample["label"] < 0:
                raise ValueError("no label, where other samples have one")
        if self._caption_column is not None:
            sample["caption"] = self.captions(index)
        return sample

    def captions(self, index: int) -> list[str]:
        return clean(self.texts(index))

    def texts(self, index: int) -> list[Text]:
        """The captions as they are stored."""
        if self._caption_column is None:
            return []
        row = cast("pa.Table", self._texts[index])
        return as_texts(_as_bytes(row.column(0)).to_pylist()[0])

    def column(self, name: str) -> Iterator[bytes | None]:
        """The values of a column, row by row, as the bytes of their text."""
        if name not in self._table.column_names:
            raise DataError(
                f"data.split_column: {self._where} has no column '{name}'. "
                f"{nearest(name, self._table.column_names)}"
            )
        for part in self._table.select_columns([name]).with_format("arrow").iter(_ROWS):
            for value in _as_bytes(cast("pa.Table", part).column(0)).to_pylist():
                whole = value is None or isinstance(value, bytes)
                yield value if whole else str(value).encode()

    def describe(self, index: int) -> str:
        return f"{self._where} row {index}"

    def labels(self) -> np.ndarray | None:
        return self._labels


def _open(cfg: DataConfig, split: str) -> tuple[datasets.Dataset, list[Path]]:
    import datasets

    if cfg.path is None:
        raise DataError("data.path is missing: a Parquet or Arrow file, or a folder of them")
    root = Path(cfg.path).expanduser()
    for saved in (root / split, root):
        if (saved / "state.json").is_file():
            table = datasets.load_from_disk(str(saved))
            assert isinstance(table, datasets.Dataset)
            return table, sorted(saved.glob("*.arrow"))
    if (root / "dataset_dict.json").is_file():
        splits = json.loads((root / "dataset_dict.json").read_text())["splits"]
        raise DataError(
            f"{root} has no split '{split}', but {', '.join(splits)}. "
            f"{split_hint(cfg, split, splits)}"
        )
    files = _files(root, split)
    kind = "parquet" if files[0].suffix == ".parquet" else "arrow"
    names = [str(file) for file in files if file.suffix == files[0].suffix]
    try:
        # `datasets` keeps what it made of a file by its path and time; the name adds the content.
        content = files_fingerprint(root, [Path(name) for name in names])
        table = datasets.load_dataset(kind, content, data_files=names, split="train")
    except Exception as error:  # pyarrow's and datasets' own kinds for files that are not theirs
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{root}: cannot read split '{split}': {reason}") from error
    assert isinstance(table, datasets.Dataset)
    return table, files


def _check_columns(cfg: DataConfig, table: datasets.Dataset, file: Path) -> str | None:
    """The column of captions, None where there is none; warns of labels that are not there.

    Raises:
        DataError: a column that was asked for is not there, or holds something else.
    """
    columns = table.column_names
    if cfg.image_column not in columns:
        raise _no_column("image", cfg.image_column, file, columns)
    if cfg.label_column not in columns:
        missing = _no_column("label", cfg.label_column, file, columns)
        if cfg.label_column != DataConfig.label_column:
            raise missing
        hint = nearest(cfg.label_column, columns)
        log.warning(f"{file} has no column 'label': its images have no labels. {hint}")
    asked = cfg.caption_column != DataConfig.caption_column
    if cfg.caption_column not in columns:
        if asked:
            raise _no_column("caption", cfg.caption_column, file, columns)
        return None
    kind = table.data.schema.field(cfg.caption_column).type
    if _text_type(kind) is not None:
        return cfg.caption_column
    wrong = f"{file}: column '{cfg.caption_column}' holds {kind}, not texts or lists of texts"
    if asked:
        raise DataError(f"data.caption_column: {wrong}")
    log.warning(f"{wrong}: its images have no captions")
    return None


def _no_column(kind: str, name: str, file: Path, columns: list[str]) -> DataError:
    return DataError(f"data.{kind}_column: {file} has no column '{name}'. {nearest(name, columns)}")


def _text_type(kind: pa.DataType) -> pa.DataType | None:
    """The type of the bytes of a text or of a list of texts; None for other types."""
    import pyarrow as pa

    texts = ("string", "large_string", "binary", "large_binary")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(pa.large_binary()) if str(kind.value_type) in texts else None
    return pa.large_binary() if str(kind) in texts else None


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts as bytes: Arrow does not check that they are UTF-8, and fails when it makes a `str`."""
    kind = _text_type(column.type)
    return column if kind is None else column.cast(kind)


def _warn_of_empty(file: Path, column: pa.ChunkedArray) -> None:
    """Count the empty ones in lists of captions: their samples keep the others, and say nothing."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made when it is imported
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return
    texts = pc.list_flatten(_as_bytes(column))
    empty = pc.or_kleene(pc.is_null(texts), pc.equal(pc.binary_length(texts), 0))
    rows = pc.list_parent_indices(column).filter(empty)
    if len(rows):
        log.warning(f"{file}: {len(rows)} empty captions left out (first: row {rows[0]})")


def _labels(
    cfg: DataConfig, table: datasets.Dataset, split: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    import datasets

    feature = table.features[cfg.label_column]
    values = np.asarray(table[cfg.label_column])
    if isinstance(feature, datasets.ClassLabel):
        return _by_name(cfg, values.astype(np.int64), tuple(feature.names), split)
    if values.ndim != 1 or values.dtype.kind not in "iubUS":
        raise DataError(
            f"data.label_column={cfg.label_column} holds {values.dtype} of shape "
            f"{values.shape[1:]} or missing values; a label is a whole number or a word"
        )
    train = values
    if split != cfg.train_split:
        with suppress(DataError):  # without a training split, this one numbers its own
            train = np.asarray(_open(cfg, cfg.train_split)[0][cfg.label_column])
    return class_indices(values, train, split)


def _by_name(
    cfg: DataConfig, labels: np.ndarray, names: tuple[str, ...], split: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as the training split numbers the same names, which need not be in this order."""
    import datasets

    if split == cfg.train_split:
        return labels, names
    train = None
    with suppress(DataError):  # without a training split, this one numbers its own
        train = _open(cfg, cfg.train_split)[0].features.get(cfg.label_column)
    numbered = tuple(train.names) if isinstance(train, datasets.ClassLabel) else ()
    return as_training(labels, names, numbered, split)


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


def _fingerprint(files: list[Path], images: datasets.Dataset, column: str) -> str:
    """Digest of what the files hold, and the image files that they only name."""
    named = _named_files(images, column)
    return files_fingerprint(files[0].parent, [*files, *map(Path, named)])


def _named_files(images: datasets.Dataset, column: str) -> list[str]:
    """Paths of images whose bytes are not in the table."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made when it is imported
    values = images.with_format("arrow").data.column(column)
    if not pa.types.is_struct(values.type) or values.type.get_field_index("path") < 0:
        return []
    missing = pc.is_null(pc.struct_field(values, "bytes"))
    return pc.struct_field(values, "path").filter(missing).drop_null().to_pylist()
