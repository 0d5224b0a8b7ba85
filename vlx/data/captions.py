"""Captions as sources hand them out: cleaned in one place, and counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from vlx.data.source import Captioned, Source

Text = str | bytes | None
"""A caption as it is stored: not yet known to be UTF-8, or to hold anything."""


@runtime_checkable
class HasTexts(Protocol):
    """A source that can show its captions as they are stored, the unusable ones among them."""

    def texts(self, index: int) -> list[Text]: ...


def clean(texts: Iterable[Text]) -> list[str]:
    """The usable ones of a sample's captions, without white space around them.

    Raises:
        ValueError: none is usable; the message says why the first is not.
    """
    kept, reasons = [], []
    for text in texts:
        cleaned, reason = _clean_one(text)
        if reason:
            reasons.append(reason)
        else:
            kept.append(cleaned)
    if not kept:
        raise ValueError(reasons[0] if reasons else "no caption")
    return kept


def _clean_one(text: Text) -> tuple[str, str]:
    """The caption, and why it cannot be used, which is empty where it can."""
    if text is None:
        return "", "no caption"
    data = text if isinstance(text, bytes) else as_bytes(text)
    try:
        cleaned = data.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        return "", f"caption is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}"
    return cleaned, "" if cleaned else "empty caption"


def as_bytes(text: str) -> bytes:
    """What was read, also where it was not UTF-8 and was read with `surrogateescape`."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a pair that JSON spelled out as \ud83d: not UTF-8 either
        return text.encode("utf-8", "surrogatepass")


def as_texts(value: object) -> list[Text]:
    """A field that holds one caption or a list of them; what is no text counts as none."""
    values = value if isinstance(value, list) else [value]
    return [text if isinstance(text, str | bytes) else None for text in values]


@dataclass
class LeftOut:
    """Counts the unusable captions of samples that keep others: nothing else reports those."""

    count: int = 0
    first: str = ""

    def add(self, name: str, texts: Iterable[Text]) -> None:
        found = [_clean_one(text)[1] for text in texts]
        reasons = [reason for reason in found if reason]
        if reasons and len(reasons) < len(found):
            self.count += len(reasons)
            self.first = self.first or f"{name}: {reasons[0]}"

    def __str__(self) -> str:
        """In words; empty for none."""
        words = "captions left out of samples that keep others"
        return f"{self.count} {words} (first: {self.first})" if self.count else ""


def captioned(source: Source) -> Captioned | None:
    """The source where it has captions; a wrapper has the method whether or not it has them."""
    return source if "caption" in source.info.fields and isinstance(source, Captioned) else None


@dataclass
class CaptionStats:
    """What the captions of a source look like."""

    samples: int
    """Samples looked at, spread evenly over all."""
    total: int
    captions: int = 0
    """Usable captions."""
    fewest: int = 0
    """Captions of the sample that has the fewest, of those that have any."""
    most: int = 0
    longest: int = 0
    """Words of the longest caption."""
    duplicates: int = 0
    """Captions that are word for word an earlier one."""
    left_out: int = 0
    """Unusable captions of samples that keep others."""
    unusable: list[str] = field(default_factory=list)
    """`name: reason` of the samples without a usable caption."""

    def __str__(self) -> str:
        some = f" of {self.total}" if self.samples < self.total else ""
        parts = [f"{self.captions} for {self.samples}{some} samples"]
        if self.captions:
            mean = self.captions / (self.samples - len(self.unusable))
            spread = f"{self.fewest} to {self.most} a sample (mean {mean:.2f})"
            parts += [
                f"{self.most} a sample" if self.fewest == self.most else spread,
                f"longest {self.longest} words",
                f"duplicates {self.duplicates}",
            ]
        if self.left_out:
            parts.append(f"{self.left_out} left out of samples that keep others")
        if self.unusable:
            parts.append(f"samples without a usable one {len(self.unusable)}")
        return ", ".join(parts)


def caption_stats(source: Source, most: int | None = None) -> CaptionStats:
    """Counts over all samples of a source with captions, or over `most` spread evenly over it."""
    with_captions = captioned(source)
    assert with_captions is not None
    count = len(source) if most is None else min(most, len(source))
    stats, seen = CaptionStats(count, len(source)), set[int]()
    for index in np.linspace(0, len(source) - 1, count).round().astype(int).tolist():
        try:
            captions = with_captions.captions(index)
        except Exception as error:  # as in training: any failure is that sample's
            stats.unusable.append(f"{source.describe(index)}: {error}")
            continue
        if isinstance(source, HasTexts):
            stats.left_out += len(source.texts(index)) - len(captions)
        stats.fewest = min(stats.fewest or len(captions), len(captions))
        stats.most = max(stats.most, len(captions))
        stats.captions += len(captions)
        for caption in captions:
            stats.longest = max(stats.longest, len(caption.split()))
            key = hash(caption)  # 64 bits: a set of numbers takes a fraction of a set of texts
            stats.duplicates += key in seen
            seen.add(key)
    return stats
