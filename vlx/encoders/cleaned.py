"""A tokenizer that cleans captions first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlx.core.text import Tokenizer, Tokens


class CleanedTokenizer:
    """`core.text.Tokenizer` of captions that went through `clean`; all else is the tokenizer's."""

    def __init__(self, inner: Tokenizer, clean: Callable[[str], str]) -> None:
        self.inner, self.clean = inner, clean
        self.name, self.vocab_size = inner.name, inner.vocab_size
        self.context_length, self.prefix = inner.context_length, inner.prefix
        self.pad_id, self.mask_id = inner.pad_id, inner.mask_id
        self.start_id, self.end_id = inner.start_id, inner.end_id

    def encode(self, texts: Sequence[str]) -> Tokens:
        """As the tokenizer's."""
        return self.inner.encode([self.clean(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """As the tokenizer's."""
        return self.inner.decode(ids)
