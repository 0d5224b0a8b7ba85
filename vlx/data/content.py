"""Digests of what files hold, read once: what a file was called or when it changed decides nothing.

A fingerprint of names and sizes takes a re-written shard for the old one. Here every byte counts,
and is read again only where the file may have changed. A file is known again by device, inode,
size, time of change of content and time of change of status (the last of which no program can put
back, as `touch -r` and archives do with the one before): a stat a file, no reading. As in git's
index, a file whose times are too near to the moment at which it was read is read again the next
time: within one tick of the clock it could have changed twice.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlx.data.cache import cache_dir, digest, locked

log = logging.getLogger("vlx")
_ROW = np.dtype([("state", np.int64, 5), ("digest", np.uint8, 32)])
_NONE = np.zeros(32, dtype=np.uint8)  # of a file that is not there
_THREADS = 8
_CHUNK, _READ = 1024, 16  # files that a thread looks at, and reads, at a time
_SAID_FROM = 1 << 30  # bytes to read, from which it is said
RACY_NS = 2_000_000_000
"""Coarsest clock of the file systems in use (FAT)."""


def content_digests(root: Path, files: Sequence[str]) -> np.ndarray:
    """(N, 32) uint8: SHA-256 of each file's content, zeros for one that cannot be read.

    root: the folder under whose name they are remembered; files: their paths.
    """
    store = cache_dir() / "contents" / f"{digest(os.fsdecode(os.path.realpath(root)))}.npy"
    try:
        with locked(store.with_suffix(".lock"), f"reading {root} for its fingerprint"):
            known = _load(store)
            found, new = _digests(root, files, known)
            if len(new):
                _store(store, _merged(known, new))
            return found
    except OSError as error:
        log.warning(f"cannot keep digests of {root}: {error}. Its files are read by every run")
        return _digests(root, files, np.zeros(0, dtype=_ROW))[0]


def combined(parts: Iterable[str | bytes], digests: np.ndarray | None = None) -> str:
    """16 hex digits of words and of files' digests, in their order."""
    result = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        result.update(len(data).to_bytes(8, "big") + data)
    if digests is not None:
        result.update(np.ascontiguousarray(digests).tobytes())
    return result.hexdigest()[:16]


def files_fingerprint(root: Path, files: Sequence[Path], *words: str) -> str:
    """16 hex digits of `words` and of what the files hold, wherever they lie."""
    return combined(words, content_digests(root, [str(file) for file in files]))


def code_digest(*files: Path) -> str:
    """16 hex digits of what Python files do: comments, docstrings and layout aside."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not _is_text(part)]
    return combined(ast.dump(tree) for tree in trees)


def _is_text(node: ast.stmt) -> bool:
    constant = node.value if isinstance(node, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)


def _digests(root: Path, files: Sequence[str], known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digests of all files, and rows to remember of those that were read."""
    starts = range(0, len(files), _CHUNK)
    with ThreadPoolExecutor(_THREADS) as pool:  # the waiting and the hashing run beside each other
        parts = list(pool.map(lambda start: _states(files[start : start + _CHUNK]), starts))
        states = np.concatenate([np.zeros((0, 5), dtype=np.int64), *parts])
        found = np.tile(_NONE, (len(files), 1))
        place = _places(states, known)
        found[place >= 0] = known["digest"][place[place >= 0]]
        unknown = np.flatnonzero((place < 0) & (states[:, 2] >= 0))
        size = int(states[unknown, 2].sum())
        if size >= _SAID_FROM:
            log.info(f"reading {size / 2**30:.1f} GiB of {root} for the fingerprint, once")
        some = [unknown[start : start + _READ].tolist() for start in range(0, len(unknown), _READ)]
        read = pool.map(lambda rows: _read_all([files[int(row)] for row in rows]), some)
        new = []
        for row, one in zip(unknown.tolist(), chain.from_iterable(read)):
            if one is None:
                continue
            found[row] = np.frombuffer(one.digest, dtype=np.uint8)
            if one.lasting:
                new.append((one.state, found[row]))
    return found, np.array(new, dtype=_ROW)


def _states(files: Sequence[str]) -> np.ndarray:
    """(K, 5) int64 of each file; -1 where there is none."""
    states = np.full((len(files), 5), -1, dtype=np.int64)
    for row, file in enumerate(files):
        try:
            states[row] = _state(os.stat(file))
        except (OSError, ValueError):
            continue
    return states


def _state(stat: os.stat_result) -> tuple[int, int, int, int, int]:
    # Inodes and devices are unsigned; numpy wants them in int64.
    inode, device = (n - (1 << 64) if n >> 63 else n for n in (stat.st_ino, stat.st_dev))
    return device, inode, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _places(states: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(N,) the row of `known`, which is sorted by its states' bytes, that has each state, or -1."""
    if not len(known):
        return np.full(len(states), -1)
    keys, wanted = _keys(known["state"]), _keys(states)
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


def _keys(states: np.ndarray) -> np.ndarray:
    """(N,) of one fixed-size value for each state, so that they sort and compare."""
    return np.ascontiguousarray(states, dtype=">i8").view("S40")[:, 0]


class _Read(NamedTuple):
    state: tuple[int, int, int, int, int]
    digest: bytes
    lasting: bool
    """Whether the file was still long enough for its state to tell its content."""


def _read_all(files: Sequence[str]) -> list[_Read | None]:
    return [_read(file) for file in files]


def _read(file: str) -> _Read | None:
    now = time.time_ns()
    try:
        with open(file, "rb") as stream:
            state = _state(os.fstat(stream.fileno()))
            content = hashlib.file_digest(stream, "sha256").digest()
    except OSError:
        return None
    return _Read(state, content, max(state[3], state[4]) < now - RACY_NS)


def _merged(known: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Old and new rows; of a file that has changed, the new one."""
    old = known[~np.isin(known["state"][:, 1], new["state"][:, 1])]
    rows = np.concatenate([old, new])
    return rows[np.argsort(_keys(rows["state"]), kind="stable")]


def _load(store: Path) -> np.ndarray:
    try:
        found = np.load(store, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return np.zeros(0, dtype=_ROW)
    return found if found.dtype == _ROW else np.zeros(0, dtype=_ROW)


def _store(store: Path, rows: np.ndarray) -> None:
    tmp = store.with_name(f".{store.name}.{os.getpid()}")
    try:
        with tmp.open("wb") as stream:
            np.save(stream, rows)
        os.replace(tmp, store)
    finally:
        tmp.unlink(missing_ok=True)
