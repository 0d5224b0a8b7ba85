"""Texts (names, paths, words) stay the characters that were typed, whatever a reader makes of them.

Hydra reads `1e3`, `1_000`, `yes` as a number or a truth value before it knows that the key's value
is a text. Here such a value is quoted first, where the schema says text.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from vlx.core.hints import without_none


@cache
def text_keys(cls: type, prefix: str = "") -> frozenset[str]:
    """The dotted keys of a configuration whose values are texts, or lists of them."""
    found: set[str] = set()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        (hint, _), name = without_none(hints[field.name]), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            found |= text_keys(typing.cast(type, hint), f"{name}.")
        elif hint is str or (typing.get_origin(hint) is list and typing.get_args(hint) == (str,)):
            found.add(name)
    return frozenset(found)


def as_typed(word: str, keys: Collection[str]) -> str:
    """`name=1e3` as `name='1e3'` where the key's value is a text; every other word as it is.

    `null` alone, in small letters, stays no text: it unsets a key. Elements of a list or of a sweep
    (`a,1e3`) are quoted one by one. What has quotes or brackets of its own is Hydra's; where it
    cannot read them and they do not begin the value, they are a text's: `~/{split}-*.tar`.
    """
    key, equals, value = word.partition("=")
    if key.lstrip("+") not in keys or not equals:
        return word
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if any(mark in inner for mark in "\"'[](){}"):
        hydras = value[0] in "[\"'" or _parsed(value) is not None
        return word if hydras else f"{key}={_in_quotes(value)}"
    parts = ",".join(_quoted(part) for part in inner.split(","))
    return f"{key}=[{parts}]" if inner is not value else f"{key}={parts}"


def _quoted(text: str) -> str:
    parsed = _parsed(text)
    if text in ("null", "") or (parsed is not None and parsed.value() == text):
        return text
    return _in_quotes(text)


def _in_quotes(text: str) -> str:
    return QuotedString(text.strip(), Quote.single).with_quotes()


def _parsed(text: str) -> Override | None:
    """What Hydra's grammar makes of a value; None where it takes none."""
    try:
        return OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return None
