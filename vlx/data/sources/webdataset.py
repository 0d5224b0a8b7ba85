"""WebDataset shards: tar files of samples, local or fetched once from a URL.

Shards are indexed (shard, offset, size of every image and caption), not streamed: any sample can
be read at any time, so shuffling is global and a resumed run goes on with exactly the samples it
had left.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlx.core.errors import DataError, nearest
from vlx.data.cache import Index, cached_index, digest, pack_names, unpack_name
from vlx.data.captions import LeftOut, Text, as_texts, clean
from vlx.data.class_names import as_training, written_names
from vlx.data.config import DataConfig
from vlx.data.content import files_fingerprint
from vlx.data.labels import class_indices
from vlx.data.shards import find_shards
from vlx.data.source import Sample, SourceInfo

log = logging.getLogger("vlx")
_IMAGES = ("jpg", "jpeg", "png", "webp")
_VERSION = "3"
_BLOCK = 512  # of a tar
_NOWHERE = (0, -1)  # the place of a member that is not there
_MAX_SEEN = 1000  # names kept to suggest one
_SMALL = 64  # bytes: a label may have any suffix


class WebDataset:
    """`path` is a folder of shards (train-000.tar, train/000.tar), or patterns of files or URLs.

    Patterns are separated by `::`; braces expand (`{000..127}`, `{a,b}`), `{split}` becomes the
    split's name, local ones may hold `*`. A sample is the members of one key:
    .jpg .jpeg .png .webp, .cls or .json {"label": ...}, and a caption: .txt, or else .json
    {"caption": a text or a list of them}. `data.caption_column` names another member or key. Of a
    member that comes twice in a shard the first holds. Of a truncated shard the whole samples are
    used; the cut stands in the index as one sample that cannot be read, so that it is counted.
    """

    def __init__(self, cfg: DataConfig, split: str) -> None:
        self._shards = find_shards(cfg.path, split)
        self._index = _index(self._shards, cfg)
        if self._index.meta["left_out"]:
            log.warning(f"{self._shards[0].parent}: {self._index.meta['left_out']}")
        self._caption_column = cfg.caption_column
        self._has_captions = bool((self._index.arrays["caption_sizes"] >= 0).any())
        if not self._has_captions and cfg.caption_column != DataConfig.caption_column:
            seen = self._index.meta["seen"]
            raise DataError(
                f"data.caption_column: {self._shards[0]} has no member or key "
                f"'{cfg.caption_column}'. {nearest(cfg.caption_column, seen)}"
            )
        codes, values = self._index.arrays["labels"], self._index.meta["values"]
        self._labels: np.ndarray | None = None
        names: tuple[str, ...] = ()
        if values:
            labelled = codes >= 0
            mine = _as_numbers(values)
            labels, names = class_indices(mine, _train_values(cfg, split, mine), split)
            self._labels = np.where(labelled, labels[codes.clip(min=0)], -1)
            folder = self._shards[0].parent
            written = written_names(folder, len(names))
            trained = _train_folder(cfg, folder, split) if written else folder
            self._labels, names = as_training(
                self._labels, written or names, written_names(trained, len(names)), split
            )
        self.info = SourceInfo(
            name=f"{self._shards[0].parent.name}/{self._shards[0].stem}",
            split=split,
            num_samples=len(codes),
            fields=(
                "image",
                *(["label"] if values else []),
                *(["caption"] if self._has_captions else []),
            ),
            class_names=names,
            fingerprint=self._index.meta["digest"],
            mirror_safe=cfg.mirror_safe,
            extra={"shards": str(len(self._shards)), "image": cfg.image_column},
        )

    def __len__(self) -> int:
        return len(self._index.arrays["labels"])

    def read(self, index: int) -> Sample:
        arrays = self._index.arrays
        if arrays["sizes"][index] < 0:
            raise ValueError(self._index.meta["damage"][str(index)])
        sample: Sample = {"image": self._bytes(index, arrays["offsets"], arrays["sizes"])}
        if self._labels is not None:
            sample["label"] = int(self._labels[index])
            if sample["label"] < 0:
                raise ValueError("no label, where other samples have one")
        if self._has_captions:
            sample["caption"] = self.captions(index)
        return sample

    def captions(self, index: int) -> list[str]:
        arrays = self._index.arrays
        if arrays["sizes"][index] < 0:
            raise ValueError(self._index.meta["damage"][str(index)])
        if arrays["caption_sizes"][index] < 0:
            raise ValueError("no caption, where other samples have one")
        return clean(self.texts(index))

    def texts(self, index: int) -> list[Text]:
        """The captions as they are stored."""
        arrays = self._index.arrays
        if arrays["caption_sizes"][index] < 0:
            return []
        data = self._bytes(index, arrays["caption_offsets"], arrays["caption_sizes"])
        if not arrays["caption_in_json"][index]:
            return [data]
        return as_texts(_json(data).get(self._caption_column))

    def _bytes(self, index: int, offsets: np.ndarray, sizes: np.ndarray) -> bytes:
        """A member of a sample."""
        with self._shards[int(self._index.arrays["shards"][index])].open("rb") as stream:
            stream.seek(int(offsets[index]))
            return stream.read(int(sizes[index]))

    def describe(self, index: int) -> str:
        shard = self._shards[int(self._index.arrays["shards"][index])]
        return f"{shard}: {unpack_name(self._index, index)}"

    def labels(self) -> np.ndarray | None:
        return self._labels


@dataclass
class _Group:
    """Members of one key that have been read. A place is an offset in the shard and a size."""

    key: str = ""
    image: tuple[int, int] | None = None
    label: str | None = None
    caption: tuple[int, int] | None = None
    caption_in_json: bool = False


@dataclass
class _Building:
    """An index while its shards are read."""

    names: list[bytes] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    images: list[tuple[int, int]] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    captions: list[tuple[int, int]] = field(default_factory=list)
    captions_in_json: list[bool] = field(default_factory=list)
    damage: dict[str, str] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    repeated: list[str] = field(default_factory=list)
    """Members whose name came before in their shard."""
    seen: set[str] = field(default_factory=set)
    """Suffixes of members and keys of JSON: what a caption column may be meant to be."""

    def add(self, shard: int, group: _Group) -> None:
        self.names.append(os.fsencode(group.key))
        self.shards.append(shard)
        self.images.append(group.image or _NOWHERE)
        self.labels.append(group.label)
        self.captions.append(group.caption or _NOWHERE)
        self.captions_in_json.append(group.caption_in_json)

    def add_damage(self, shard: int, name: str, reason: str) -> None:
        self.damage[str(len(self.names))] = reason
        self.add(shard, _Group(name))

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
        for prefix, places in (("", self.images), ("caption_", self.captions)):
            pairs = np.array(places, dtype=np.int64).reshape(-1, 2)
            arrays[f"{prefix}offsets"], arrays[f"{prefix}sizes"] = pairs.T.copy()
        arrays["caption_in_json"] = np.array(self.captions_in_json, dtype=bool)
        arrays["labels"] = codes
        meta = {"values": values.tolist(), "damage": self.damage, "digest": content}
        notes = [str(self.left_out)] if self.left_out.count else []
        if self.repeated:
            notes.append(f"{len(self.repeated)} repeated members (first: {self.repeated[0]})")
        meta |= {"left_out": "; ".join(notes), "seen": sorted(self.seen)}
        return Index(arrays, meta)


def _index(shards: list[Path], cfg: DataConfig) -> Index:
    content = files_fingerprint(shards[0].parent, shards)
    columns = _Columns(cfg.image_column, cfg.label_column, cfg.caption_column)

    def build() -> Index:
        building = _Building()
        for number, shard in enumerate(shards):
            _scan(building, number, shard, columns)
        return building.finish(content)

    name = digest(_VERSION, *columns, content, *(shard.name for shard in shards))
    return cached_index("shards", name, build, lambda index: True)


class _Columns(NamedTuple):
    image: str
    label: str
    caption: str


def _scan(building: _Building, number: int, shard: Path, columns: _Columns) -> None:
    group, names = _Group(), set[str]()

    def finish() -> None:
        if group.image is not None:
            building.add(number, group)
        elif group.key:
            building.add_damage(number, group.key, f"no member {' '.join(_IMAGES)}")

    try:
        for member, data in _members(shard):
            if member.name in names:
                building.repeated.append(f"{shard.name}: {member.name}")
                continue
            names.add(member.name)
            key, suffix = _key(member.name)
            if key != group.key:
                finish()
                group = _Group(key)
            _take(building, group, suffix, member, data, columns)
    except CutOff as error:
        # The damage stands for the sample that it hit: the one being read, unless that is whole.
        cut = _key(error.member)[0] if error.member else f"after {group.key or 'its start'}"
        labelled = any(label is not None for label in building.labels)
        captioned = any(place is not _NOWHERE for place in building.captions)
        whole = (group.label or not labelled) and (group.caption or not captioned)
        if group.image and whole and cut != group.key:
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
    building: _Building,
    group: _Group,
    suffix: str,
    member: tarfile.TarInfo,
    data: bytes,
    columns: _Columns,
) -> None:
    place, seen = (member.offset_data, member.size), building.seen
    if len(seen) < _MAX_SEEN:
        seen.add(suffix)
    if suffix == columns.image or (columns.image == "image" and suffix in _IMAGES):
        group.image = place
    elif suffix == "cls" or suffix == columns.label:
        group.label = data.decode("utf-8", "replace").strip()
    elif suffix == columns.caption or (columns.caption == "caption" and suffix == "txt"):
        group.caption, group.caption_in_json = place, False
    elif suffix == "json":
        content = _json(data)
        if len(seen) < _MAX_SEEN:
            seen.update(content)
        if group.label is None and columns.label in content:
            group.label = str(content[columns.label])
        if group.caption is None and columns.caption in content:
            group.caption, group.caption_in_json = place, True
            building.left_out.add(group.key, as_texts(content[columns.caption]))


def _json(data: bytes) -> dict[str, Any]:
    """The content of a .json member; empty where it is none, so that what it lacks is named."""
    try:
        content = json.loads(data.decode("utf-8-sig", "surrogateescape"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


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


def _train_folder(cfg: DataConfig, own: Path, split: str) -> Path:
    """Where the training split's shards lie; without one, this split's own."""
    if split == cfg.train_split:
        return own
    with suppress(DataError):
        return find_shards(cfg.path, cfg.train_split)[0].parent
    return own
