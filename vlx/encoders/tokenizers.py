"""Byte-level BPE: CLIP's own vocabulary, and one trained on a source's captions."""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from vlx.core.errors import ConfigError
from vlx.core.text import Tokens

FILE = "tokenizer.json"
"""In a run directory: the tokenizer that was trained for it."""
_CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_MERGES = 49152 - 256 - 2
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL = ("[PAD]", "[START]", "[END]", "[MASK]")
_BYTES = 256


class BpeTokenizer:
    """A BPE of the `tokenizers` library as `core.text.Tokenizer`: `[start] ... [end] [pad]`."""

    def __init__(
        self,
        backend: Backend,
        *,
        name: str,
        vocab_size: int,
        context_length: int,
        special: tuple[int, int, int, int | None],
        clean: Callable[[str], str] = str,
    ) -> None:
        if context_length < 3:
            raise ConfigError(f"text.context_length={context_length} leaves no place for a word")
        self.backend, self.name = backend, name
        self.vocab_size, self.context_length = vocab_size, context_length
        self.pad_id, self.start_id, self.end_id, self.mask_id = special
        self.prefix = [self.start_id]
        self.clean = clean

    def encode(self, texts: Sequence[str]) -> Tokens:
        found = self.backend.encode_batch_fast(
            [self.clean(text) for text in texts], add_special_tokens=False
        )
        room = self.context_length - 2
        ids = np.full((len(texts), self.context_length), self.pad_id, dtype=np.int64)
        full = np.array([len(one) + 2 for one in found], dtype=np.int64)
        lengths = np.minimum(full, self.context_length)
        for row, (one, length) in enumerate(zip(found, lengths)):
            ids[row, 0] = self.start_id
            ids[row, 1 : length - 1] = one.ids[:room]
            ids[row, length - 1] = self.end_id
        return Tokens(ids, lengths, full)

    def decode(self, ids: Sequence[int]) -> str:
        special = {self.pad_id, self.start_id, self.end_id}
        return self.backend.decode([i for i in ids if i not in special]).strip()


def clip_clean(text: str) -> str:
    """CLIP's cleaning: broken Unicode mended, HTML entities resolved twice, single spaces, lower
    case."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def lower_clean(text: str) -> str:
    """Single spaces, lower case."""
    return " ".join(text.split()).lower()


def clip_tokenizer(context_length: int = 77) -> BpeTokenizer:
    """CLIP's 49,408 ids, from the vocabulary that open_clip carries; padded with 0.

    Ids equal open_clip's own tokenizer (a test compares them); the words `<start_of_text>` and
    `<end_of_text>` inside a caption are words like others here.
    """
    return BpeTokenizer(
        _clip_backend(),
        name="CLIP's tokenizer of 49,408 ids",
        vocab_size=49408,
        context_length=context_length,
        special=(0, 49406, 49407, None),
        clean=clip_clean,
    )


@lru_cache(maxsize=1)
def _clip_backend() -> Backend:
    spec = importlib.util.find_spec("open_clip")  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("text.tokenizer=clip needs the vocabulary: pip install open_clip_torch")
    file = Path(spec.submodule_search_locations[0]) / _CLIP_VOCABULARY
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    merges = [(a, b) for a, b in (line.split() for line in lines[1 : _CLIP_MERGES + 1])]
    alphabet = _byte_order()
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Backend(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " ")]  # pyright: ignore
    )
    return backend


def _byte_order() -> list[str]:
    """GPT-2's characters for the 256 bytes, in the order of its table: visible ones first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(_BYTES) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(_BYTES + n) for n in range(len(hidden))]


def train_bpe(texts: Iterable[str], vocab_size: int, context_length: int) -> BpeTokenizer:
    """A byte-level BPE of at most `vocab_size` ids from captions; the same for the same captions.

    Raises `ConfigError` where there is no room for the 256 bytes and the four special tokens.
    """
    smallest = _BYTES + len(_SPECIAL)
    if vocab_size < smallest:
        raise ConfigError(f"text.vocab_size={vocab_size} must be at least {smallest}")
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in _SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((lower_clean(text) for text in texts), trainer)
    return _trained(backend, vocab_size, context_length)


def bpe_from_file(file: Path, vocab_size: int, context_length: int) -> BpeTokenizer:
    """What `save_bpe` wrote. Raises `ConfigError` where it holds more ids than `vocab_size`."""
    backend = Backend.from_file(str(file))
    if backend.get_vocab_size() > vocab_size:
        raise ConfigError(
            f"{file} holds {backend.get_vocab_size()} ids, more than text.vocab_size={vocab_size}"
        )
    return _trained(backend, vocab_size, context_length)


def _trained(backend: Backend, vocab_size: int, context_length: int) -> BpeTokenizer:
    pad, start, end, mask = range(len(_SPECIAL))
    return BpeTokenizer(
        backend,
        name=f"a BPE of {vocab_size:,} ids trained on the captions",
        vocab_size=vocab_size,
        context_length=context_length,
        special=(pad, start, end, mask),
        clean=lower_clean,
    )


def bpe_bytes(tokenizer: BpeTokenizer) -> bytes:
    """The file that `bpe_from_file` reads, and `transformers` too."""
    content = json.loads(tokenizer.backend.to_str())
    return json.dumps(content, ensure_ascii=False, indent=1).encode()
