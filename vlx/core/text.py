"""What turns captions into token ids, for whoever holds no tokenizer library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """Encoded texts, n of them, at most L tokens each."""

    ids: np.ndarray
    """(n, L) int64, start and end tokens included, padded behind."""
    lengths: np.ndarray
    """(n,) int64: tokens that are no padding, start and end included; at most L."""
    full_lengths: np.ndarray
    """(n,) int64: what `lengths` would be without the limit; larger means cut."""


class Tokenizer(Protocol):
    """Texts to ids and back. Picklable: worker processes get a copy."""

    name: str
    """What an error calls it: a kind with its size, or a path."""
    vocab_size: int
    """Rows that an embedding table needs."""
    context_length: int
    """L: tokens of a text at most, start and end included."""
    pad_id: int
    start_id: int
    end_id: int
    prefix: list[int]
    """What stands before the words of an encoded text: the start token, or nothing."""
    mask_id: int | None
    """For masked words; None where the vocabulary has no such token."""

    def encode(self, texts: Sequence[str]) -> Tokens:
        """A text that is too long is cut, its end token forced last."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of one row without start, end and padding tokens."""
        ...
