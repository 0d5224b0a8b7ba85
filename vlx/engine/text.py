"""The tokenizer of a run: a published one, a local one, or one trained on the run's captions."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

from vlx.core.caption import Clean, clean_albef
from vlx.core.errors import DataError, StorageError
from vlx.core.files import write_atomic
from vlx.core.text import Tokenizer
from vlx.data.cache import cache_dir, digest, locked
from vlx.data.source import Captioned, Source
from vlx.encoders.cleaned import CleanedTokenizer
from vlx.encoders.config import TextConfig
from vlx.encoders.tokenizers import (
    FILE,
    BpeTokenizer,
    bpe_bytes,
    bpe_from_file,
    clip_tokenizer,
    train_bpe,
)
from vlx.engine.rundir import CONFIG_FILE

log = logging.getLogger("vlx")
_TRAINED, _PUBLISHED = "bpe", "clip"
_VOCAB_SIZE = 8192


def shape_tokenizer(cfg: TextConfig | None) -> Tokenizer | None:
    """A tokenizer of the right sizes without data: one that would be trained knows bytes only."""
    if cfg is None or cfg.tokenizer != _TRAINED:
        return _published(cfg)
    return _cleaned(cfg, train_bpe((), cfg.vocab_size or _VOCAB_SIZE, cfg.context_length))


def run_tokenizer(cfg: TextConfig | None, run_dir: Path) -> Tokenizer | None:
    """The tokenizer of a run that was made before. Raises `DataError` where its file is gone."""
    if cfg is None or cfg.tokenizer != _TRAINED:
        return _published(cfg)
    file = run_dir / FILE
    if not file.is_file():
        raise DataError(f"{file} is missing: the tokenizer that was trained for the run")
    return _cleaned(cfg, bpe_from_file(file, cfg.vocab_size or _VOCAB_SIZE, cfg.context_length))


def make_tokenizer(
    cfg: TextConfig | None, source: Source, run_dir: Path, *, main: bool = True
) -> Tokenizer | None:
    """The tokenizer of a new or a resumed run; a trained one is kept in its directory.

    source: the training split, whose captions a `bpe` is trained on (cached by their content).
    """
    if cfg is None or cfg.tokenizer != _TRAINED:
        return _published(cfg)
    if (run_dir / FILE).is_file():
        return run_tokenizer(cfg, run_dir)
    tokenizer = _train(cfg, source)
    if main:
        write_atomic(run_dir / FILE, bpe_bytes(tokenizer))
    return _cleaned(cfg, tokenizer)


def _cleaned(cfg: TextConfig, tokenizer: Tokenizer) -> Tokenizer:
    if cfg.clean is Clean.none:
        return tokenizer
    return CleanedTokenizer(tokenizer, clean_albef)


def _published(cfg: TextConfig | None) -> Tokenizer | None:
    return None if cfg is None else _cleaned(cfg, _named(cfg))


def _named(cfg: TextConfig) -> Tokenizer:
    """A tokenizer that exists, by what `text.tokenizer` says."""
    if cfg.tokenizer == _PUBLISHED:
        return clip_tokenizer(cfg.context_length)
    run = Path(cfg.tokenizer).expanduser()
    if (run / CONFIG_FILE).is_file() and (run / FILE).is_file():
        return bpe_from_file(run / FILE, cfg.vocab_size or _VOCAB_SIZE, cfg.context_length)
    from vlx.encoders.hf_tokenizer import HfTokenizer

    return HfTokenizer(cfg.tokenizer, cfg.context_length)


def _train(cfg: TextConfig, source: Source) -> BpeTokenizer:
    size, length = cfg.vocab_size or _VOCAB_SIZE, cfg.context_length
    if not isinstance(source, Captioned) or "caption" not in source.info.fields:
        fields = ", ".join(source.info.fields)
        raise DataError(
            f"text.tokenizer=bpe is trained on captions, and {source.info.name} has {fields}: "
            "set text.tokenizer to a run of vlx align, to a tokenizer's directory, or to clip"
        )
    content = hashlib.sha256()
    clean = clean_albef if cfg.clean is Clean.albef else str
    texts = [clean(text) for text in _all(source)]
    for text in texts:
        content.update(text.encode() + b"\0")
    file = cache_dir() / "tokenizers" / f"{digest('1', str(size), content.hexdigest())}.json"
    try:
        with locked(file.with_suffix(".lock"), f"the tokenizer {file}"):
            if not file.is_file():
                log.info(f"training a BPE of {size:,} ids on {len(texts):,} captions")
                write_atomic(file, bpe_bytes(train_bpe(texts, size, length)))
            return bpe_from_file(file, size, length)
    except (OSError, StorageError) as error:
        log.warning(f"cannot keep a tokenizer in {file}: {error}")
        return train_bpe(texts, size, length)


def _all(source: Captioned | Source) -> Iterator[str]:
    """Every usable caption."""
    assert isinstance(source, Captioned)
    for index in range(len(source)):  # type: ignore[arg-type]
        try:
            yield from source.captions(index)
        except (ValueError, OSError):  # counted where the sample is read
            continue
