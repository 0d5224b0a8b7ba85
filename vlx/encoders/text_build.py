"""Builds the text encoder or the language model that a recipe chose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlx.core.errors import ConfigError, nearest
from vlx.core.text import Tokenizer
from vlx.encoders.config import TextConfig
from vlx.encoders.text import TextEncoder

if TYPE_CHECKING:
    from vlx.encoders.language_model import LanguageModel

_OWN = ("clip",)  # built here, on timm's blocks
# Published models have up to this share of rows that no token uses, for round sizes.
_SPARE_ROWS = 0.1


def build_text_encoder(cfg: TextConfig, tokenizer: Tokenizer, **architecture: Any) -> TextEncoder:
    """The text encoder of `cfg.name`; keywords (`causal=False`) fix what the paper fixes.

    With `image_dim` and `fusion_layers`, a `FusionText`: a BERT whose last blocks look at an image.
    Raises `ConfigError` for an unknown name, and where the tokenizer's ids do not fit the table.
    """
    if "image_dim" in architecture:
        from vlx.encoders.fusion_text import FusionText

        new = _check_name(cfg, ["bert"], "BERT, in which the method fuses the image,")
        fusing = FusionText(cfg, _rows(cfg, tokenizer) if new else 0, **architecture)
        if not new:
            _check_rows(cfg, tokenizer, fusing.spec.vocab_size)
        return fusing
    if cfg.name in _OWN:
        from vlx.encoders.clip_text import ClipText

        return ClipText(cfg, _rows(cfg, tokenizer), **architecture)
    from vlx.encoders.hf_model import encoder_kinds
    from vlx.encoders.hf_text import HfText

    kind = _check_name(cfg, [*_OWN, *encoder_kinds()], "text encoder")
    wrong = [f"{key}={value}" for key, value in architecture.items() if (key, value) != _WHOLE]
    if wrong:
        raise ConfigError(
            f"text.name={cfg.name} cannot be built with {', '.join(wrong)}, as the method needs. "
            f"Use text.name={_OWN[0]}"
        )
    encoder = HfText(cfg, _rows(cfg, tokenizer) if kind else 0)
    if not kind:
        _check_rows(cfg, tokenizer, encoder.spec.vocab_size)
    return encoder


_WHOLE = ("causal", False)  # every token sees all others: what BERT's kin do anyway


def build_language_model(cfg: TextConfig, tokenizer: Tokenizer) -> LanguageModel:
    """The causal language model of `cfg.name`. Raises `ConfigError` as `build_text_encoder`."""
    from vlx.encoders.hf_model import decoder_kinds
    from vlx.encoders.language_model import LanguageModel

    kind = _check_name(cfg, decoder_kinds(), "language model")
    model = LanguageModel(cfg, _rows(cfg, tokenizer) if kind else 0)
    if not kind:
        _check_rows(cfg, tokenizer, model.spec.vocab_size)
    return model


def _check_name(cfg: TextConfig, kinds: list[str], what: str) -> bool:
    """Whether the name is a kind; otherwise it is a directory, or this raises `ConfigError`."""
    if cfg.name in kinds:
        return True
    if Path(cfg.name).expanduser().is_dir():
        return False
    hint = nearest(cfg.name, kinds)
    raise ConfigError(
        f"text.name={cfg.name} is no {what} and no local directory. {hint + ' ' if hint else ''}"
        "Or give the directory of a Hugging Face model, with config.json and weights"
    )


def _rows(cfg: TextConfig, tokenizer: Tokenizer) -> int:
    """Rows of a new token table."""
    rows = cfg.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"{tokenizer.name} has {tokenizer.vocab_size} ids, and {cfg.name} would have "
            f"{rows} rows: set text.vocab_size=null"
        )
    return rows


def _check_rows(cfg: TextConfig, tokenizer: Tokenizer, rows: int) -> None:
    """Weights go with one tokenizer: its ids are the rows, but for a few spare ones."""
    if (1 - _SPARE_ROWS) * rows <= tokenizer.vocab_size <= rows:
        return
    raise ConfigError(
        f"{tokenizer.name} has {tokenizer.vocab_size} ids, and the model in {cfg.name} has {rows} "
        f"rows: set text.tokenizer={cfg.name}, or the tokenizer that it was trained with"
    )
