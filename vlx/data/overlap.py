"""Whether what is scored was trained on, told by what the samples hold: names decide nothing.

One pattern for both splits, a split under another name, a shard that lies in both, images copied
from folder to folder: all are found by the digests of the images.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from vlx.core.errors import DataError
from vlx.data.cache import Index, cached_index, digest
from vlx.data.source import Source

log = logging.getLogger("vlx")
INCIDENTAL = 0.05
"""Share of a split up to which equal images are taken for the data's own: public sets hold some in
both of their splits (CIFAR: Barz and Denzler 2020), and vendors draw several emoji alike (of names
held out Google's 1.6 %, Twitter's 3.2 %). They are counted and marked, not refused. Ours."""
_VERSION = "1"


@runtime_checkable
class HasContents(Protocol):
    """A source that knows its samples by what they hold."""

    def contents(self) -> np.ndarray | None:
        """(N, 32) uint8: a digest of each sample's image, the same for the same image in any split;
        zeros for one that cannot be read. None where a part of the source does not know."""
        ...


def image_digests(images: Iterable[bytes | None]) -> np.ndarray:
    """(N, 32) uint8: SHA-256 of encoded images or of pixels; zeros for None."""
    nothing = bytes(32)
    rows = [nothing if one is None else hashlib.sha256(one).digest() for one in images]
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 32)


def contents_of(source: Source) -> np.ndarray | None:
    """(N, 32) uint8, as `HasContents`. Of a source that has no `contents` every image is read, once
    for a fingerprint. None where there is no fingerprint to keep them under."""
    if isinstance(source, HasContents):
        return source.contents()
    info = source.info
    if not info.fingerprint:
        return None

    def build() -> Index:
        log.info(f"reading the images of {info.name}/{info.split} to tell them apart, once")
        return Index({"contents": image_digests(_images(source))}, {})

    name = digest(_VERSION, info.fingerprint, json.dumps(info.extra, sort_keys=True))
    return cached_index("images", name, build, lambda index: True).arrays["contents"]


def _images(source: Source) -> Iterator[bytes | None]:
    for index in range(len(source)):
        try:
            image = source.read(index)["image"]
        except Exception:  # any failure is that sample's: it is not scored either
            yield None
        else:
            yield image if isinstance(image, bytes) else np.asarray(image).tobytes()


def trained_on(test: Source, train: Source) -> np.ndarray:
    """(N,) bool: which samples of `test` are samples of `train`.

    Sources that do not know their samples are the same where their fingerprints are.
    """
    found, known = contents_of(test), contents_of(train)
    if found is None or known is None:
        same = bool(test.info.fingerprint) and test.info.fingerprint == train.info.fingerprint
        return np.full(len(test), same)
    # Bytes of a fixed size sort and compare; of zeros, an unreadable sample's, nothing is left.
    keys, wanted = (np.ascontiguousarray(rows).view("S32")[:, 0] for rows in (known, found))
    return np.isin(wanted, keys) & (wanted != b"")


def training_samples(
    test: Source, train: Source, *, key: str, allowed: bool, name: str | None = None
) -> str:
    """What a result says of the samples of `test` that were trained on; empty for none.

    key: the key that chose `test`, for messages. allowed: `data.test_on_train`. name: what the
    training data is called, where that is not its source's name.

    Raises:
        DataError: there are more than `INCIDENTAL` of them, and nobody asked for that.
    """
    same = trained_on(test, train)
    count = int(same.sum())
    if not count:
        return ""
    samples = f"{count} of {len(test)} samples"
    name = name or f"{train.info.name}/{train.info.split}"
    said = f"scored on training data: {samples}, of {name}"
    if allowed or count <= INCIDENTAL * len(test):
        return said
    raise DataError(
        f"{key}={test.info.split} would be {said} (first: "
        f"{test.describe(int(np.argmax(same)))}). Use another split, or hold a fifth of one out, "
        "as in data.train_split=NAME:train data.test_split=NAME:test (with data.split_column=file "
        "for files). data.test_on_train=true scores them all the same, and marks the results"
    )
