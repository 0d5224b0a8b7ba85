"""Captions as token ids: drawn by seed, counted, moved to the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlx.core import random
from vlx.core.text import Tokenizer


@dataclass
class EncodedText:
    """Captions as ids, on the host or on the device."""

    ids: Tensor
    """(B, L) int64."""
    lengths: Tensor
    """(B,) int64 tokens that are no padding."""
    full_lengths: Tensor
    """(B,) int64 before cutting."""


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> EncodedText:
    """Texts to tensors."""
    found = tokenizer.encode(texts)
    arrays = (found.ids, found.lengths, found.full_lengths)
    return EncodedText(*(torch.from_numpy(array) for array in arrays))


def drawn_captions(counts: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
    """(B,) which of its `counts (B,)` captions each sample shows in an epoch, from (seed, epoch,
    sample): the same for any number of workers and processes."""
    u = random.uniform(random.key(ids, seed, epoch, "caption"), 1)[:, 0]
    return (u * counts).long().clamp(max=counts - 1)


def to_device(text: EncodedText, device: torch.device) -> EncodedText:
    """The same tensors on a device."""
    parts = (text.ids, text.lengths, text.full_lengths)
    return EncodedText(*(part.to(device, non_blocking=True) for part in parts))


class CaptionCounts:
    """What a run's captions lose to the context length and spend on padding."""

    def __init__(self) -> None:
        self.captions = self.cut = self.tokens = self.places = 0
        self.first = ""
        """The sample that the first cut caption is of."""

    def add(self, text: EncodedText, name: Callable[[int], str]) -> None:
        """text: on the host; name: of the sample that a row of it is of."""
        cut = (text.full_lengths > text.lengths).nonzero()[:, 0]
        if len(cut) and not self.first:
            self.first = name(int(cut[0]))
        self.captions += len(text.ids)
        self.cut += len(cut)
        self.tokens += int(text.lengths.sum())
        self.places += text.ids.numel()

    def by_name(self) -> dict[str, list[int]]:
        """For `results.json`."""
        return {
            "captions/read": [self.captions],
            "captions/cut": [self.cut],
            "captions/tokens": [self.tokens],
            "captions/places": [self.places],
        }

    def line(self, context_length: int) -> str:
        """For the log: captions, those that were cut, and the share of padding."""
        padding = 1 - self.tokens / max(1, self.places)
        first = f"; first: {self.first}" if self.first else ""
        return (
            f"{self.captions:,} captions read: {self.cut:,} cut at {context_length} tokens "
            f"(text.context_length{first}), {padding:.0%} of all places are padding"
        )
