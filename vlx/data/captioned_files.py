"""Image files whose captions another file lists: what the sources of such files share."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlx.data.cache import Index, cached_index, digest, pack_names
from vlx.data.captions import LeftOut, Text, as_bytes, clean
from vlx.data.content import combined, content_digests, files_fingerprint
from vlx.data.source import Sample, SourceInfo

log = logging.getLogger("vlx")
_VERSION = "1"
_PROBED = 16  # images looked for in every folder that may hold them
_MAX_FOLDERS = 64


@dataclass
class Listing:
    """What a caption file says: images in its order, each with its captions as they are stored."""

    names: list[str] = field(default_factory=list)
    """Paths of the images, relative to a folder of images."""
    texts: list[list[Text]] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    """What was left out: kind of fault to the names of those that have it."""

    def fault(self, kind: str, name: object) -> None:
        self.faults.setdefault(kind, []).append(str(name))

    @property
    def note(self) -> str:
        """All faults in one line; empty for none."""
        parts = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in self.faults.items()]
        left_out = LeftOut()
        for name, texts in zip(self.names, self.texts):
            left_out.add(name, texts)
        return "; ".join([*parts, str(left_out)] if left_out.count else parts)


def listing_index(
    files: Sequence[Path], words: Sequence[str], read: Callable[[], Listing]
) -> Index:
    """The index of what `read` lists, kept by what `files` hold.

    words: what besides the files' content decides the listing. Arrays: `names` and `ends` of the
    images, `texts` and `text_ends` of all captions, `firsts (N + 1,)` of every image's first one.
    """

    def build() -> Index:
        listing = read()
        texts = [[b"" if t is None else _raw(t) for t in stored] for stored in listing.texts]
        names = [as_bytes(name) for name in listing.names]
        packed = pack_names([text for stored in texts for text in stored])
        arrays = pack_names(names)
        arrays |= {"texts": packed["names"], "text_ends": packed["ends"]}
        arrays["firsts"] = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        content = hashlib.sha256(b"\0".join(names))
        content.update(arrays["firsts"].tobytes() + arrays["texts"].tobytes())
        meta = {"note": listing.note, "digest": content.hexdigest()}
        return Index(arrays, meta)

    content = files_fingerprint(files[0].parent, files)
    return cached_index("captions", digest(_VERSION, *words, content), build, lambda index: True)


def _raw(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else as_bytes(text)


class CaptionedFiles:
    """The images of an index under a folder; a source once a subclass has found both.

    file: the caption file, which messages name; folders: where the images may be, the likeliest
    first. The folder that has most of some images is taken.
    """

    def __init__(
        self, index: Index, file: Path, folders: Iterable[Path], split: str, mirror_safe: bool
    ) -> None:
        self._index, self._file = index, file
        if index.meta["note"]:
            log.warning(f"{file}: {index.meta['note']}")
        self._root = self._find_root(folders)
        self._has_texts = len(index.arrays["text_ends"]) > 0
        self.info = SourceInfo(
            name=f"{file.parent.name}/{file.stem}",
            split=split,
            num_samples=len(self),
            fields=("image", "caption") if self._has_texts else ("image",),
            fingerprint=combined([index.meta["digest"]], self.contents()),
            mirror_safe=mirror_safe,
        )

    def __len__(self) -> int:
        return len(self._index.arrays["ends"])

    def read(self, index: int) -> Sample:
        sample: Sample = {}
        if self._has_texts:
            sample["caption"] = self.captions(index)
        try:
            sample["image"] = Path(self.describe(index)).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"no such image; {self._file.name} lists it") from None
        return sample

    def describe(self, index: int) -> str:
        return str(self._root / self._name(index))

    def labels(self) -> np.ndarray | None:
        return None

    def contents(self) -> np.ndarray:
        """(N, 32) uint8: digests of the images."""
        return content_digests(self._root, [self.describe(row) for row in range(len(self))])

    def captions(self, index: int) -> list[str]:
        return clean(self.texts(index))

    def texts(self, index: int) -> list[Text]:
        """The captions as they are stored; an absent one is empty."""
        arrays = self._index.arrays
        first, last = (int(row) for row in arrays["firsts"][index : index + 2])
        return [_slice(arrays["texts"], arrays["text_ends"], row) for row in range(first, last)]

    def _name(self, index: int) -> str:
        return os.fsdecode(_slice(self._index.arrays["names"], self._index.arrays["ends"], index))

    def _find_root(self, folders: Iterable[Path]) -> Path:
        rows = np.unique(np.linspace(0, max(0, len(self) - 1), _PROBED).astype(int))
        names = [self._name(row) for row in rows.tolist() if row < len(self)]
        looked: list[Path] = []
        most, best = -1, Path()
        for folder in folders:
            looked.append(folder)
            found = sum((folder / name).is_file() for name in names)
            if found > most:
                most, best = found, folder
            if found == len(names):
                break
        if names and most == 0:
            places = ", ".join(str(folder) for folder in looked[:4])
            log.warning(f"{self._file}: images such as {names[0]} are not in {places}")
        return best


def folders_in(root: Path, depth: int = 2) -> Iterator[Path]:
    """The folder and those below it, level by level, as far as they are few."""
    level = [root]
    yield root
    for _ in range(depth):
        entries = [entry for folder in level for entry in os.scandir(folder)]
        found = [e.path for e in entries if not e.name.startswith(".") and e.is_dir()]
        level = [Path(path) for path in sorted(found)[:_MAX_FOLDERS]]
        yield from level


def _slice(buffer: np.ndarray, ends: np.ndarray, row: int) -> bytes:
    """The bytes at `row` of what `pack_names` packed."""
    start = int(ends[row - 1]) if row else 0
    return buffer[start : int(ends[row])].tobytes()
