"""What Hydra and OmegaConf raise, in one line and in the user's words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from hydra.core.override_parser.types import Override

from vlx.config.shorthand import option_names
from vlx.core.errors import ConfigError, VlxError, nearest

_TYPES = {
    "Integer": "an integer",
    "Float": "a number",
    "bool": "true or false",
    "Boolean": "true or false",
    "string": "text",
}


def explain(
    error: Exception, parsed: Sequence[Override], known: Callable[[], Iterable[str]]
) -> VlxError:
    """The `ConfigError` for an error of a composition.

    parsed: the overrides, where the value given is found. known: every key, for a key that a
    recipe or preset misspells.
    """
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    if isinstance(root, VlxError):
        return root
    key = str(getattr(root, "full_key", None) or getattr(error, "full_key", None) or "")
    text = str(root)
    named = re.search(r"full_key: (\S+)", text)
    key = key or (named[1] if named else "")
    where = re.search(r"In '((?:preset|recipe)/.*?)'", text)
    file = f"{where[1]}: " if where else ""
    given = _given(key, parsed)
    enum = re.search(r"Invalid value '(.*?)', expected one of \[(.*?)\]", text)
    if enum:
        hint = nearest(enum[1], enum[2].split(", "))
        return ConfigError(f"{file}{key}={enum[1]} must be one of {enum[2]}. {hint}")
    option = re.search(r"Could not find '([\w-]+)/(.*?)'", text)
    if option:
        group, name = option[1], option[2]
        return ConfigError(
            f"{file}no {group} '{name}'. {nearest(name, option_names(group))}".rstrip()
        )
    sweep = re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'", text)
    if sweep:
        name, value = sweep[1].split("=", 1)
        return ConfigError(
            f"'{sweep[1]}' is a sweep: add -m to run each value, or write {name}=[{value}] for "
            f"""a list and '{name}="{value}"' for text"""
        )
    expected = _expected(text)
    if expected is not None:
        return ConfigError(f"{file}{key}={given or expected[1]} must be {expected[0]}")
    if re.search(r"Key '.*?' (?:is )?not in", text):
        return ConfigError(f"{file}unknown key '{key}'. {nearest(key, known())}".rstrip())
    first = text.splitlines()[0] if text else type(root).__name__
    return ConfigError(f"{key}={given}: {first}" if given else f"{key}: {first}" if key else first)


def _expected(text: str) -> tuple[str, str] | None:
    """(the type wanted, the value as OmegaConf saw it) of a conversion error, else None."""
    number = re.search(r"Value '(.*)' of type '.*?' could not be converted to (\w+)", text)
    if number:
        return _TYPES.get(number[2], number[2]), number[1]
    truth = re.search(r"Value '(.*)' is not a valid (\w+)", text)
    if truth:
        return _TYPES.get(truth[2], truth[2]), truth[1]
    words = re.search(r"Cannot convert '.*' to (\w+): '(.*)'", text)
    if words:
        return _TYPES.get(words[1], words[1]), words[2]
    choice = re.search(r"Value (.*) \(\w+\) is not a valid input for <enum '(.*?)'>", text)
    if choice:
        return f"one {choice[2]}", choice[1]
    if "is not a ListConfig" in text:
        return "a list, e.g. [0.9,0.95]", ""
    if "is not Optional" in text:
        return "a value other than null", "null"
    return None


def _given(key: str, parsed: Sequence[Override]) -> str:
    for override in reversed(parsed):
        if override.key_or_group == key and override.input_line is not None:
            return override.get_value_string()
    return ""
