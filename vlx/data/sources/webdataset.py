"""WebDataset shards: tar files of samples, local or fetched once from a URL.

Shards are indexed (shard, offset, size of every image), not streamed: any sample can be read at
any time, so shuffling is global and a resumed run goes on with exactly the samples it had left.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlx.core.errors import DataError
from vlx.data.cache import Index, cached_index, digest, pack_names, unpack_name
from vlx.data.config import DataConfig
from vlx.data.fetch import fetch_shards, is_remote
from vlx.data.labels import class_indices
from vlx.data.source import Sample, SourceInfo

log = logging.getLogger("vlx")
_IMAGES = ("jpg", "jpeg", "png", "webp")
_VERSION = "1"
_BLOCK = 512  # of a tar
_SMALL = 64  # bytes: a label may have any suffix


class WebDataset:
    """`path` is a folder of shards (train-000.tar, train/000.tar), or patterns of files or URLs.

    Patterns are separated by `::`; braces expand (`{000..127}`, `{a,b}`), `{split}` becomes the
    split's name, local ones may hold `*`. A sample is the members of one key:
    .jpg .jpeg .png .webp, and .cls or .json {"label": ...}. Of a truncated shard the whole samples
    are used; the cut stands in the index as one sample that cannot be read, so that it is counted.
    """

    def __init__(self, cfg: DataConfig, split: str) -> None:
        self._shards = find_shards(cfg.path, split)
        self._index = _index(self._shards, cfg)
        codes, values = self._index.arrays["labels"], self._index.meta["values"]
        self._labels: np.ndarray | None = None
        names: tuple[str, ...] = ()
        if values:
            labelled = codes >= 0
            mine = _as_numbers(values)
            labels, names = class_indices(mine, _train_values(cfg, split, mine), split)
            self._labels = np.where(labelled, labels[codes.clip(min=0)], -1)
            names = _written_names(self._shards[0].parent, len(names)) or names
        self.info = SourceInfo(
            name=f"{self._shards[0].parent.name}/{self._shards[0].stem}",
            split=split,
            num_samples=len(codes),
            fields=("image", "label") if values else ("image",),
            class_names=names,
            fingerprint=self._index.meta["digest"],
            extra={"shards": str(len(self._shards))},
        )

    def __len__(self) -> int:
        return len(self._index.arrays["labels"])

    def read(self, index: int) -> Sample:
        arrays = self._index.arrays
        size = int(arrays["sizes"][index])
        if size < 0:
            raise ValueError(self._index.meta["damage"][str(index)])
        with self._shards[int(arrays["shards"][index])].open("rb") as stream:
            stream.seek(int(arrays["offsets"][index]))
            sample: Sample = {"image": stream.read(size)}
        if self._labels is not None:
            sample["label"] = int(self._labels[index])
            if sample["label"] < 0:
                raise ValueError("no label, where other samples have one")
        return sample

    def describe(self, index: int) -> str:
        shard = self._shards[int(self._index.arrays["shards"][index])]
        return f"{shard}: {unpack_name(self._index, index)}"

    def labels(self) -> np.ndarray | None:
        return self._labels


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}` and `a{x,y}` as the shell expands them; zero padding is kept."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if first <= last else -1
        words = [f"{n:0{len(numbers[1])}d}" for n in range(first, last + step, step)]
    else:
        words = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain.from_iterable(expand_braces(head + w + tail) for w in words))


def find_shards(path: str | None, split: str) -> list[Path]:
    """The local files of a split's shards; those at URLs are fetched first."""
    if path is None:
        raise DataError("data.path is missing: a folder of .tar shards, a pattern, or a URL")
    root = Path(path).expanduser()
    if root.is_dir():
        files = sorted(root.rglob("*.tar"))
        chosen = [f for f in files if re.match(rf"{re.escape(split)}([-_.]|$)", f.stem)]
        chosen = chosen or [f for f in files if f.parent.name == split]
        if not chosen:
            found = ", ".join(f.name for f in files[:5]) or "no .tar file"
            raise DataError(f"{root} has no shard of split '{split}' (found: {found})")
        return chosen
    patterns = path.replace("{split}", split).split("::")
    places = list(itertools.chain.from_iterable(expand_braces(p) for p in patterns))
    remote = [is_remote(place) for place in places]
    if any(remote) and not all(remote):
        raise DataError(f"data.path={path} mixes files and URLs: name one kind")
    shards = fetch_shards(places) if all(remote) else _local(places)
    compressed = [shard for shard in shards if shard.suffix in (".gz", ".tgz", ".bz2", ".xz")]
    if compressed:
        raise DataError(f"{compressed[0]} is compressed: samples cannot be reached. Unpack to .tar")
    return shards


def _local(patterns: list[str]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        files = [Path(f) for f in sorted(glob.glob(os.path.expanduser(pattern)))]
        if not files:
            raise DataError(f"data.path: no file {pattern}")
        found += files
    return found


@dataclass
class _Building:
    """An index while its shards are read."""

    names: list[bytes] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    damage: dict[str, str] = field(default_factory=dict)

    def add(self, shard: int, name: str, place: tuple[int, int], label: str | None) -> None:
        self.names.append(os.fsencode(name))
        self.shards.append(shard)
        self.offsets.append(place[0])
        self.sizes.append(place[1])
        self.labels.append(label)

    def add_damage(self, shard: int, name: str, reason: str) -> None:
        self.damage[str(len(self.names))] = reason
        self.add(shard, name, (0, -1), None)

    def finish(self, content: str) -> Index:
        known = np.array([label is not None for label in self.labels], dtype=bool)
        values, inverse = np.unique(
            np.array([label for label in self.labels if label is not None], dtype=str),
            return_inverse=True,
        )
        codes = np.full(len(self.labels), -1, dtype=np.int32)
        codes[known] = inverse
        arrays = pack_names(self.names)
        arrays["shards"] = np.array(self.shards, dtype=np.int32)
        arrays["offsets"] = np.array(self.offsets, dtype=np.int64)
        arrays["sizes"] = np.array(self.sizes, dtype=np.int64)
        arrays["labels"] = codes
        meta = {"values": values.tolist(), "damage": self.damage, "digest": content}
        return Index(arrays, meta)


def _index(shards: list[Path], cfg: DataConfig) -> Index:
    states = [shard.stat() for shard in shards]
    where = [f"{shard.resolve()}:{s.st_size}:{s.st_mtime_ns}" for shard, s in zip(shards, states)]
    content = hashlib.sha256()
    for shard, state in zip(shards, states):
        content.update(f"{shard.name}:{state.st_size}".encode())
    columns = (cfg.image_column, cfg.label_column)

    def build() -> Index:
        building = _Building()
        for number, shard in enumerate(shards):
            _scan(building, number, shard, columns)
        return building.finish(content.hexdigest()[:16])

    name = digest(_VERSION, *columns, *where)
    return cached_index("shards", name, build, lambda index: True)


@dataclass
class _Group:
    """Members of one key that have been read."""

    key: str = ""
    image: tuple[int, int] | None = None
    label: str | None = None


def _scan(building: _Building, number: int, shard: Path, columns: tuple[str, str]) -> None:
    group = _Group()

    def finish() -> None:
        if group.image is not None:
            building.add(number, group.key, group.image, group.label)
        elif group.key:
            building.add_damage(number, group.key, f"no member {' '.join(_IMAGES)}")

    try:
        for member, data in _members(shard):
            key, suffix = _key(member.name)
            if key != group.key:
                finish()
                group = _Group(key)
            _take(group, suffix, member, data, columns)
    except CutOff as error:
        # The damage stands for the sample that it hit: the one being read, unless that is whole.
        cut = _key(error.member)[0] if error.member else f"after {group.key or 'its start'}"
        labelled = any(label is not None for label in building.labels)
        if group.image and (group.label or not labelled) and cut != group.key:
            finish()
        elif group.key:
            cut = group.key
        building.add_damage(number, cut, f"damaged shard: {error}")
        return
    finish()


def _key(member: str) -> tuple[str, str]:
    """`a/b.left.jpg` as (`a/b`, `left.jpg`): a key ends at the first dot of the file's name."""
    folder, slash, base = member.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _take(
    group: _Group, suffix: str, member: tarfile.TarInfo, data: bytes, columns: tuple[str, str]
) -> None:
    image_column, label_column = columns
    if suffix == image_column or (image_column == "image" and suffix in _IMAGES):
        group.image = (member.offset_data, member.size)
    elif suffix == "cls" or suffix == label_column:
        group.label = data.decode("utf-8", "replace").strip()
    elif suffix == "json" and group.label is None:
        try:
            content = json.loads(data)
        except ValueError:
            return  # the sample then has no label, and is named for that
        if isinstance(content, dict) and label_column in content:
            group.label = str(content[label_column])


class CutOff(Exception):  # noqa: N818 - the sample it stands for is the error
    """A shard ends before it should, in `member` where that is known."""

    def __init__(self, reason: str, member: str = "") -> None:
        super().__init__(reason)
        self.member = member


def _members(shard: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Files of a tar in order, the small ones with their content.

    Raises `CutOff` where the shard is cut off or overwritten; Python's tarfile takes damage after
    the first member for the end.
    """
    size = shard.stat().st_size
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar, shard.open("rb") as stream:
            for member in tar:
                if member.offset_data + member.size > size:
                    raise CutOff(f"cut off at byte {size}, in {member.name}", member.name)
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                data = b""
                if member.size < _SMALL or member.name.lower().endswith((".cls", ".json")):
                    stream.seek(member.offset_data)
                    data = stream.read(member.size)
                if member.isfile():
                    yield member, data
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] - tarfile keeps every header otherwise
            stream.seek(end)
            if stream.read(_BLOCK).strip(b"\0"):
                raise CutOff(f"unreadable from byte {end} of {size}")
    except tarfile.TarError as error:
        raise CutOff(f"{error} after byte {end} of {size}") from error
    if size <= end:
        log.warning(f"{shard} ends without an end-of-archive mark: it may be cut off")


def _as_numbers(values: list[str]) -> np.ndarray:
    """As integers where all are."""
    if all(re.fullmatch(r"-?\d+", value) for value in values):
        return np.array([int(value) for value in values])
    return np.array(values)


def _train_values(cfg: DataConfig, split: str, mine: np.ndarray) -> np.ndarray:
    """Labels that the training split has; a split alone numbers its own."""
    if split == cfg.train_split:
        return mine
    try:
        shards = find_shards(cfg.path, cfg.train_split)
    except DataError:
        return mine
    return _as_numbers(_index(shards, cfg).meta["values"])


def _written_names(folder: Path, count: int) -> tuple[str, ...]:
    """Class names from `classnames.txt` beside the shards, a line each, where it fits."""
    for file in (folder / "classnames.txt", folder.parent / "classnames.txt"):
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            if len(lines) >= count:
                return tuple(lines)
    return ()
