"""Builds the text encoder that a recipe chose."""

from __future__ import annotations

from typing import Any

from vlx.core.text import Tokenizer
from vlx.encoders.clip_text import ClipText
from vlx.encoders.config import TextConfig
from vlx.encoders.text import TextEncoder


def build_text_encoder(cfg: TextConfig, tokenizer: Tokenizer, **architecture: Any) -> TextEncoder:
    return ClipText(cfg, tokenizer.vocab_size, **architecture)
