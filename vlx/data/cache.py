"""Indexes and downloaded shards under ~/.cache/vlx: built once, whole or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger("vlx")
_META = "meta.json"


@dataclass(frozen=True)
class Index:
    """What a source knows of its samples: flat arrays and a little JSON.

    Arrays, never lists of a million strings: worker processes share their pages (a Python
    object's reference count alone copies its page into every worker that looks at it).
    """

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


def pack_names(names: list[bytes]) -> dict[str, np.ndarray]:
    """Names as one buffer `names` (uint8) and `ends` (N,) int64."""
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    return {"names": np.frombuffer(b"".join(names), dtype=np.uint8), "ends": ends}


def unpack_name(index: Index, row: int) -> str:
    """The file name at `row` of what `pack_names` packed."""
    ends = index.arrays["ends"]
    start = int(ends[row - 1]) if row else 0
    return os.fsdecode(index.arrays["names"][start : int(ends[row])].tobytes())


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/vlx`, or `~/.cache/vlx`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlx"


def digest(*parts: str) -> str:
    """16 hex digits that name what was made of `parts`."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


@contextmanager
def locked(path: Path, waiting_for: str) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(f"waiting for another process to finish {waiting_for}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def cached_index(
    kind: str, name: str, build: Callable[[], Index], fresh: Callable[[Index], bool]
) -> Index:
    """The index `name`, read from the cache where it is `fresh`, else built and stored.

    Of two processes that need one index, one builds and the other waits for it. Where the cache
    cannot be written, the index lives in memory only.
    """
    folder = cache_dir() / kind / name
    try:
        with locked(folder.with_suffix(".lock"), f"the index {folder}"):
            found = _load(folder)
            if found is not None and fresh(found):
                return found
            index = build()
            _store(folder, index)
            return _load(folder) or index  # mapped from the file: one copy for all processes
    except OSError as error:
        log.warning(f"cannot keep an index in {folder}: {error}. It is built anew by every run")
        return build()


def _load(folder: Path) -> Index | None:
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in meta["arrays"]
        }
    except (OSError, ValueError, KeyError):
        return None
    return Index(arrays, meta["meta"])


def _store(folder: Path, index: Index) -> None:
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        for name, array in index.arrays.items():
            np.save(tmp / f"{name}.npy", array)
        content = {"arrays": list(index.arrays), "meta": index.meta}
        (tmp / _META).write_text(json.dumps(content), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        tmp.rename(folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
