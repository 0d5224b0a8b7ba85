"""Texts (names, paths, words) stay the characters that were typed, whatever a reader makes of them.

Hydra reads `1e3`, `1_000`, `yes` as a number or a truth value before it knows that the key's value
is a text. Here such a value is quoted first, where the schema says text.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException


def text_keys(cls: type, prefix: str = "") -> frozenset[str]:
    """The dotted keys of a configuration whose values are texts, or lists of them."""
    found: set[str] = set()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
        if dataclasses.is_dataclass(hint):
            found |= text_keys(typing.cast(type, hint), f"{name}.")
        elif hint is str or (typing.get_origin(hint) is list and typing.get_args(hint) == (str,)):
            found.add(name)
    return frozenset(found)


def as_typed(word: str, keys: Collection[str]) -> str:
    """`name=1e3` as `name='1e3'` where the key's value is a text; every other word as it is.

    `null` alone, in small letters, stays no text: it unsets a key. Elements of a list or of a sweep
    (`a,1e3`) are quoted one by one; what has quotes or brackets of its own is Hydra's.
    """
    key, equals, value = word.partition("=")
    if key.lstrip("+") not in keys or not equals:
        return word
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if any(mark in inner for mark in "\"'[](){}"):
        return word
    parts = ",".join(_quoted(part) for part in inner.split(","))
    return f"{key}=[{parts}]" if inner is not value else f"{key}={parts}"


def _quoted(text: str) -> str:
    if text in ("null", "") or _reads(text) == text:
        return text
    return QuotedString(text.strip(), Quote.single).with_quotes()


def _reads(text: str) -> Any:
    """What Hydra makes of a value."""
    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return None
