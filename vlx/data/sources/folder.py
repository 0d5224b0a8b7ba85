"""Trees of image files: PATH/SPLIT/CLASS/*.jpg, PATH/CLASS/*.jpg, or PATH/*.jpg unlabelled.

Of PATH/DOMAIN/CLASS/*.jpg a split may join several domains: photo+sketch.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from vlx.core.errors import DataError, nearest
from vlx.data.cache import Index, cached_index, digest, pack_names, unpack_name
from vlx.data.config import DataConfig
from vlx.data.content import RACY_NS, combined, content_digests
from vlx.data.joined import Joined
from vlx.data.source import Sample, Source, SourceInfo
from vlx.data.split_hint import split_hint

log = logging.getLogger("vlx")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_SPLIT_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation", "dev")
_TEST_EVERY = 10
_VERSION = "2"


def open_folder(cfg: DataConfig, split: str) -> Source:
    """The folder of a split, or those of `photo+sketch` as one source with a domain for each."""
    root = Path(cfg.path or "").expanduser()
    if "+" not in split or (root / split).is_dir():
        return Folder(cfg, split)
    return Joined({name: Folder(cfg, name) for name in split.split("+")}, root.name)


class Folder:
    """`path/split/class/...` with labels from the class folders' names, sorted.

    A tree without split folders (`path/class/...`) is split by vlx: a tenth of the files, chosen
    by a hash of the name so that it stays when files are added, is `test`, the rest `train`;
    `all` is everything. Images that lie in no class folder have no label.
    """

    def __init__(self, cfg: DataConfig, split: str) -> None:
        root, part = _find_split(cfg, split)
        stored = cached_index(
            "folders", digest(_VERSION, str(root.resolve())), lambda: _scan(root), _unchanged
        )
        if stored.meta["loose"]:
            log.warning(f"{root}: {stored.meta['loose']} images lie in no class folder: left out")
        self._root, self._index = root, stored
        self._rows = _chosen_rows(stored, part)
        names = _class_names(cfg, root, part, stored.meta["classes"])
        self._labels: np.ndarray | None = None
        if stored.meta["classes"]:
            place = np.array([names.index(name) for name in stored.meta["classes"]], dtype=np.int64)
            self._labels = place[stored.arrays["labels"][self._rows]]
        self.info = SourceInfo(
            name=f"{root.parent.name}/{root.name}" if part == "all" else root.name,
            split=split,
            num_samples=len(self._rows),
            fields=("image", "label") if names else ("image",),
            class_names=names,
            fingerprint=self._fingerprint(),
            mirror_safe=cfg.mirror_safe,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        sample: Sample = {"image": Path(self.describe(index)).read_bytes()}
        if self._labels is not None:
            sample["label"] = int(self._labels[index])
        return sample

    def describe(self, index: int) -> str:
        return str(self._root / unpack_name(self._index, int(self._rows[index])))

    def labels(self) -> np.ndarray | None:
        return self._labels

    def column(self, name: str) -> Iterable[bytes | None]:
        """`file`: every image's CLASS/NAME, the same wherever the tree lies."""
        if name != "file":
            raise DataError(f"{self.info.name} has no column '{name}': folders have 'file' alone")
        return (os.fsencode(unpack_name(self._index, int(row))) for row in self._rows)

    def contents(self) -> np.ndarray:
        """(N, 32) uint8: digests of the image files."""
        return content_digests(self._root, [self.describe(index) for index in range(len(self))])

    def _fingerprint(self) -> str:
        """Digest of all names, which hold the labels, and of what the files hold."""
        names = (os.fsencode(unpack_name(self._index, int(row))) for row in self._rows)
        return combined(names, self.contents())


def _find_split(cfg: DataConfig, split: str) -> tuple[Path, str]:
    """The folder that holds a split, and which part of it: all, train or test."""
    if cfg.path is None:
        raise DataError("data.path is missing: the folder of images")
    root = Path(cfg.path).expanduser()
    if not root.is_dir():
        raise DataError(f"data.path: {root} is not a folder")
    if (root / split).is_dir():
        return root / split, "all"
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    splits = [name for name in folders if name.lower() in (*_SPLIT_NAMES, cfg.train_split)]
    if splits:
        raise DataError(
            f"{root} has no folder '{split}', but {', '.join(splits)}. "
            f"{split_hint(cfg, split, splits)}"
        )
    if split not in ("train", "test", "all"):
        raise DataError(
            f"{root} has no folder '{split}'. {nearest(split, folders)} A tree without split "
            "folders has the splits train and test, and all, which is both"
        )
    return root, split


def _images_in(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            hidden = entry.name.startswith(".")
            if entry.name.lower().endswith(SUFFIXES) and not hidden and entry.is_file():
                yield entry


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """A folder and all below it, links followed, each once."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    yield folder
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _walk(Path(entry.path), seen)


def _scan(root: Path) -> Index:
    """Names relative to `root`, labels by class folder, and every folder's time of change."""
    started = time.time_ns()
    names: list[bytes] = []
    labels: list[int] = []
    folders: dict[str, int] = {".": root.stat().st_ctime_ns}
    classes: list[str] = []
    tops = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    for top in tops:
        label = len(classes)
        classes.append(top)
        for folder in _walk(root / top, {(root.stat().st_dev, root.stat().st_ino)}):
            folders[str(folder.relative_to(root))] = folder.stat().st_ctime_ns
            inside = str(folder.relative_to(root))
            for name in sorted(entry.name for entry in _images_in(folder)):
                names.append(os.fsencode(f"{inside}/{name}"))
                labels.append(label)
    direct = sorted(entry.name for entry in _images_in(root))
    loose = len(direct) if names else 0
    if not names:
        names, classes = [os.fsencode(name) for name in direct], []
        labels = [-1] * len(names)
    arrays = pack_names(names)
    arrays["labels"] = np.array(labels, dtype=np.int32)
    arrays["tests"] = np.array([zlib.crc32(n) % _TEST_EVERY == 0 for n in names], dtype=bool)
    meta = {"classes": classes, "folders": folders, "loose": loose, "started": started}
    return Index(arrays, {**meta, "root": str(root)})


def _unchanged(index: Index) -> bool:
    """Whether every folder is as it was: adding or removing a file changes its folder's time.

    A folder that had just changed when it was read may have changed again within the same tick.
    """
    root, last = Path(index.meta["root"]), index.meta["started"] - RACY_NS
    try:
        return all(
            (root / name).stat().st_ctime_ns == changed < last
            for name, changed in index.meta["folders"].items()
        )
    except OSError:
        return False


def _chosen_rows(index: Index, part: str) -> np.ndarray:
    tests = np.asarray(index.arrays["tests"])
    if part == "all":
        return np.arange(len(tests))
    return np.flatnonzero(tests if part == "test" else ~tests)


def _class_names(cfg: DataConfig, root: Path, part: str, found: list[str]) -> tuple[str, ...]:
    """Names of the training split's class folders, so that labels agree between splits."""
    train = root.parent / cfg.train_split
    trains = [train] if train.is_dir() else [root.parent / n for n in cfg.train_split.split("+")]
    if part != "all" or trains == [root] or not all(t.is_dir() for t in trains) or not found:
        return tuple(found)
    folders = {e.name for train in trains for e in train.iterdir() if e.is_dir()}
    names = sorted(name for name in folders if not name.startswith("."))
    if not names:
        return tuple(found)
    new = sorted(set(found) - set(names))
    if new:
        raise DataError(
            f"{root} has class folders that {cfg.train_split} lacks: {', '.join(new[:5])}. "
            f"{nearest(new[0], names)}"
        )
    return tuple(names)
