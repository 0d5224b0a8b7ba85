"""What differs between the models of timm's registry, found without building one.

An entry of the registry calls timm's builder with a class and arguments. Entries that differ only
in numbers (widths, depths, rates) are one kind: the same code runs, on other sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import timm

# Of loading and of feature extraction: no part of what is built.
_NOT_BUILT = {
    "pretrained_filter_fn", "feature_cfg", "pretrained_strict", "kwargs_filter", "pretrained_cfg",
    "pretrained_cfg_overlay",
}  # fmt: skip


_BETWEEN = " | "  # between the arguments of a kind


class _Called(Exception):  # noqa: N818 - carries what the builder was called with
    def __init__(self, cls: type, arguments: dict[str, Any]) -> None:
        self.cls, self.arguments = cls, arguments


def timm_names() -> list[str]:
    """timm's own: a method's backbone is registered too, once its module was imported."""
    return [
        n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("timm.")
    ]


def kinds() -> dict[tuple[str, str], list[str]]:
    """Class and arguments without their numbers, to the names of that kind, the smallest first."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        for module in _timm_modules():
            patch.setattr(module, "build_model_with_cfg", _record)
        for name in timm_names():
            try:
                timm.create_model(name)
            except _Called as call:
                own = {k: v for k, v in call.arguments.items() if k not in _NOT_BUILT}
                parts = sorted(f"{k}={_without_numbers(v)!r}" for k, v in own.items())
                key = (call.cls.__name__, _BETWEEN.join(parts))
                found[key].append((sum(_numbers(own)), name))
    return {key: [name for _, name in sorted(names)] for key, names in found.items()}


def cover() -> list[str]:
    """Few names that together have every class and, of each, every value of every argument."""
    parts = {
        names[0]: {(cls, part) for part in ("", *arguments.split(_BETWEEN))}
        for (cls, arguments), names in kinds().items()
    }
    left = set().union(*parts.values())
    chosen = []
    while left:
        name = max(parts, key=lambda key: len(parts[key] & left))
        left -= parts[name]
        chosen.append(name)
    return chosen


def _record(cls: type, variant: str, pretrained: bool = False, **arguments: Any) -> None:
    raise _Called(cls, arguments)


def _timm_modules() -> list[ModuleType]:
    return [
        module
        for name, module in sys.modules.items()
        if name.startswith("timm.models.") and hasattr(module, "build_model_with_cfg")
    ]


def _without_numbers(value: Any) -> Any:
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, list | tuple | set):
        return sorted({repr(_without_numbers(part)) for part in value})
    if isinstance(value, dict):
        return sorted((key, repr(_without_numbers(part))) for key, part in value.items())
    if isinstance(value, functools.partial):
        return [_without_numbers(part) for part in (value.func, value.args, value.keywords)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, _without_numbers(vars(value))]
    return getattr(value, "__qualname__", type(value).__name__)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, dict):
        yield from _numbers(tuple(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _numbers(vars(value))
