"""Which shards a pattern of files or URLs names."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from vlx.core.errors import DataError
from vlx.data.config import DataConfig
from vlx.data.fetch import fetch_shards, is_remote, to_fetch
from vlx.data.held_out import split_name

_MAX_PLACES, _MAX_PATTERN = 100_000, 10_000  # files of a pattern, and its characters


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}` and `a{x,y}` as the shell expands them; zero padding is kept.

    Raises:
        DataError: more than a hundred thousand places.
    """
    if len(pattern) > _MAX_PATTERN:
        raise DataError(f"data.path: a pattern of {len(pattern):,} characters; name a folder")
    done, open_ones = [], [pattern]
    while open_ones:
        text = open_ones.pop()
        match = re.search(r"\{([^{}]*)\}", text)
        if match is None:
            done.append(text)
            continue
        numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1])
        words: Iterable[str] = match[1].split(",")
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            step = 1 if first <= last else -1
            width = len(numbers[1])
            words = (f"{n:0{width}d}" for n in range(first, last + step, step))
        more = [
            text[: match.start()] + word + text[match.end() :]
            for word in itertools.islice(words, _MAX_PLACES + 1)
        ]
        open_ones += reversed(more)
        if len(open_ones) + len(done) > _MAX_PLACES:
            raise DataError(f"data.path={pattern} names over {_MAX_PLACES:,} files; name a folder")
    return done


def find_shards(path: str | None, split: str) -> list[Path]:
    """The local files of a split's shards; those at URLs are fetched first."""
    if path is None:
        raise DataError("data.path is missing: a folder of .tar shards, a pattern, or a URL")
    root = Path(path).expanduser()
    if len(path) <= _MAX_PATTERN and root.is_dir():
        files = sorted(root.rglob("*.tar"))
        chosen = [f for f in files if re.match(rf"{re.escape(split)}([-_.]|$)", f.stem)]
        chosen = chosen or [f for f in files if f.parent.name == split]
        if not chosen:
            found = ", ".join(f.name for f in files[:5]) or "no .tar file"
            raise DataError(f"{root} has no shard of split '{split}' (found: {found})")
        return chosen
    places = _places(path, split)
    remote = [is_remote(place) for place in places]
    if any(remote) and not all(remote):
        raise DataError(f"data.path={path} mixes files and URLs: name one kind")
    shards = fetch_shards(places) if all(remote) else _local(places)
    compressed = [shard for shard in shards if shard.suffix in (".gz", ".tgz", ".bz2", ".xz")]
    if compressed:
        raise DataError(f"{compressed[0]} is compressed: samples cannot be reached. Unpack to .tar")
    return shards


def _places(path: str, split: str) -> list[str]:
    """The files and URLs of a pattern."""
    places: list[str] = []
    for pattern in path.replace("{split}", split).split("::"):
        places += expand_braces(pattern)
        if len(places) > _MAX_PLACES:
            raise DataError(f"data.path names over {_MAX_PLACES:,} files; name a folder")
    return places


def not_fetched(cfg: DataConfig) -> list[str]:
    """What opening the data's splits would fetch: URLs and commands whose shards are not here."""
    if cfg.source != "webdataset" or cfg.path is None:
        return []
    splits = (cfg.train_split, cfg.val_split, cfg.test_split)
    words = dict.fromkeys(split_name(cfg, split)[0] for split in splits if split is not None)
    places = dict.fromkeys(place for word in words for place in _places(cfg.path, word))
    return to_fetch([place for place in places if is_remote(place)])


def _local(patterns: list[str]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        files = [Path(f) for f in sorted(glob.glob(os.path.expanduser(pattern)))]
        if not files:
            raise DataError(f"data.path: no file {pattern}")
        found += files
    return found
