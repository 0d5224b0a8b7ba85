"""`data.variant` of the embedded sources: `key=value,key=value`, read into a dataclass."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from vlx.core.errors import DataError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Options = TypeVar("Options", bound=DataclassInstance)
else:
    Options = TypeVar("Options")


def parse_variant(text: str | None, defaults: Options) -> Options:
    """`defaults` with the values of `text`, e.g. `faces=DejaVuSans+DejaVuSerif,noise=0.2`.

    The type of a default says how its value reads: a whole number, a number, or, where the default
    is a tuple, words between `+`.

    Raises:
        DataError: an unknown key, with the nearest; a key given twice; a value of another type.
    """
    known = [field.name for field in fields(defaults)]
    values: dict[str, Any] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        key, equals, value = (word.strip() for word in part.partition("="))
        if key not in known:
            raise DataError(f"data.variant: no key '{key}'. {nearest(key, known)}")
        if not equals or not value:
            raise DataError(f"data.variant: '{key}' has no value: write {key}=VALUE")
        if key in values:
            raise DataError(f"data.variant: '{key}' is given twice")
        values[key] = _typed(key, value, getattr(defaults, key))
    return replace(defaults, **values)


def _typed(key: str, value: str, default: object) -> object:
    if isinstance(default, tuple):
        return tuple(word.strip() for word in value.split("+"))
    kind, meaning = (int, "a whole number") if isinstance(default, int) else (float, "a number")
    try:
        return kind(value)
    except ValueError as error:
        raise DataError(f"data.variant: {key}={value} is not {meaning}, e.g. {default}") from error


def check_range(key: str, value: float, low: float, high: float) -> None:
    """Raises `DataError` unless `low <= value <= high`."""
    if not low <= value <= high:  # also refuses nan
        raise DataError(f"data.variant: {key}={value} is outside {low} to {high}")
