"""Any local Hugging Face tokenizer as `core.text.Tokenizer`; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlx.core.errors import ConfigError
from vlx.core.text import Tokens
from vlx.encoders.sentence_pooling import sentence_layout

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_FILE = "tokenizer.json"
# What a tokenizer.json alone calls them: it has no field that says which token is which.
_NAMES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "start": ("[CLS]", "[START]", "[BOS]", "<s>", "<bos>", "<|startoftext|>", "<|begin_of_text|>"),
    "end": ("[SEP]", "[END]", "[EOS]", "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    "mask": ("[MASK]", "<mask>"),
}


class HfTokenizer:
    """`start words end pad`: the class or begin token, the words, the separator or end token.

    That is what the tokenizer of an encoder adds itself. A language model's adds no end, often no
    start either: here the end is always there, so that a model can learn to stop, and the start
    where the vocabulary has one. Without one, `start_id` is `end_id` and texts begin with a word.
    Without a padding token the end token pads. A special token's name inside a text is text.

    path: a directory with tokenizer files, or a tokenizer.json. context_length: L, tokens of a
    text at most. Raises `ConfigError` where there is no tokenizer, or one without an end token.
    """

    def __init__(self, path: str, context_length: int) -> None:
        if context_length < 3:
            raise ConfigError(f"text.context_length={context_length} leaves no place for a word")
        self.name = path
        self.context_length = context_length
        self.backend, special = _read(path)
        end, start = special["end"], special["start"]
        if end is None:
            raise ConfigError(
                f"the tokenizer {path} has no end token (eos or sep), so a text has no end"
            )
        self.end_id = end
        self.start_id = end if start is None else start
        self.pad_id = end if special["pad"] is None else special["pad"]
        self.mask_id = special["mask"]
        self.prefix = [] if start is None else [start]
        """What stands before the words."""
        self._check_order()
        # A gap in the ids makes the highest id count, not the number of ids.
        ids = self.backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(len(ids), max(ids) + 1)

    def _check_order(self) -> None:
        """Raise `ConfigError` where the tokenizer itself puts other tokens around a text."""
        added = self.backend.encode("").ids
        if added not in ([], self.prefix, [self.end_id], [*self.prefix, self.end_id]):
            tokens = " ".join(str(self.backend.id_to_token(i)) for i in added)
            raise ConfigError(
                f"the tokenizer {self.name} puts {tokens} around a text, not a start and an end"
            )

    def encode(self, texts: Sequence[str]) -> Tokens:
        self.backend.encode_special_tokens = True  # not kept by pickling
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ahead = len(self.prefix)
        room = self.context_length - ahead - 1
        ids = np.full((len(texts), self.context_length), self.pad_id, dtype=np.int64)
        full = np.array([len(one) + ahead + 1 for one in found], dtype=np.int64)
        lengths = np.minimum(full, self.context_length)
        ids[:, :ahead] = self.prefix
        for row, (one, length) in enumerate(zip(found, lengths)):
            ids[row, ahead : length - 1] = one.ids[:room]
            ids[row, length - 1] = self.end_id
        return Tokens(ids, lengths, full)

    def decode(self, ids: Sequence[int]) -> str:
        special = {self.pad_id, self.start_id, self.end_id}
        words = [int(i) for i in ids if int(i) not in special]
        return self.backend.decode(words, skip_special_tokens=False).strip()


def _read(path: str) -> tuple[Backend, dict[str, int | None]]:
    """The tokenizer itself and the ids of its special tokens, None for those it lacks."""
    place = Path(path).expanduser()
    if place.is_dir():
        place = sentence_layout(place).transformer
    file = place / _FILE if place.is_dir() else place
    known = place.is_dir() and any(
        (place / name).is_file() for name in ("tokenizer_config.json", "config.json")
    )
    if not known and not file.is_file():
        if place.is_dir():
            raise ConfigError(
                f"text.tokenizer={path} holds no tokenizer_config.json and no {_FILE}"
            )
        raise ConfigError(
            f"text.tokenizer={path} is no local directory and no {_FILE}. Use clip, bpe, or the "
            "directory of a downloaded Hugging Face tokenizer"
        )
    try:
        tokenizer = _from_directory(place) if known else _from_file(file)
        backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    except Exception as error:  # each kind of tokenizer fails in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"cannot read the tokenizer {path}: {reason}") from error
    if backend is None:
        raise ConfigError(
            f"the tokenizer {path} has no {_FILE}: save it again by transformers' AutoTokenizer"
        )
    backend.no_truncation()
    backend.no_padding()
    return backend, _special(tokenizer, backend)


def _from_directory(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _from_file(file: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(file))


def _special(tokenizer: Any, backend: Backend) -> dict[str, int | None]:
    """Ids by role: what the tokenizer declares, else a token of a usual name."""
    declared = {
        "pad": (tokenizer.pad_token,),
        "start": (tokenizer.cls_token, tokenizer.bos_token),
        "end": (tokenizer.sep_token, tokenizer.eos_token),
        "mask": (tokenizer.mask_token,),
    }
    if not any(any(tokens) for tokens in declared.values()):
        declared = _NAMES
    ids: dict[str, int | None] = {}
    for role, tokens in declared.items():
        found = [backend.token_to_id(str(token)) for token in tokens if token]
        ids[role] = next((number for number in found if number is not None), None)
    return ids
