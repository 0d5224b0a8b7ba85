"""Captions as papers clean them before their tokenizers."""

from __future__ import annotations

import re
from enum import Enum

_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")
_WORDS = 30


class Clean(Enum):
    """How captions are cleaned, in training and evaluation alike."""

    none = "none"
    albef = "albef"


def clean_albef(caption: str) -> str:
    """ALBEF's rule (Li et al. 2021, official code): lower case, no punctuation, hyphens and slashes
    as spaces, `<person>` a plain word, at most 30 words."""
    text = _DELETED.sub("", caption.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(_SPACES.sub(" ", text).strip().split(" ")[:_WORDS])
