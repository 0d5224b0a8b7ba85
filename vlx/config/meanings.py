"""What every config key means, read from the strings under the dataclasses' fields. No torch."""

from __future__ import annotations

import ast
import dataclasses
import sys
import typing
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlx.core import registry
from vlx.core.hints import without_none
from vlx.engine.config import RunConfig

_WORDS = {bool: "true/false", int: "integer", float: "number", str: "text"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One dotted key of a run's configuration."""

    name: str
    type: str
    """In words: `integer or null`, `adamw | sgd`."""
    meaning: str
    choices: tuple[str, ...] = ()
    """The values that an enum or a true/false key takes."""


def describe(slug: str) -> dict[str, Key]:
    """Every key of a method's configuration, the method's own first."""
    own = _keys(registry.config_class(slug), "method.")
    return {key.name: key for key in own} | describe_run()


def describe_run() -> dict[str, Key]:
    """Every key of a run but the method's own."""
    return {key.name: key for key in _keys(RunConfig, "") if key.name != "method"}


def _keys(cls: type, prefix: str) -> list[Key]:
    hints, texts = typing.get_type_hints(cls), _texts(cls)
    found: list[Key] = []
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        hint, optional = without_none(hints[field.name])
        if dataclasses.is_dataclass(hint) and not optional:
            found += _keys(typing.cast(type, hint), f"{name}.")
            continue
        words, choices = _words(hint)
        kind = f"{words} or null" if optional else words
        found.append(Key(name=name, type=kind, meaning=texts.get(field.name, ""), choices=choices))
        if dataclasses.is_dataclass(hint):
            found += _keys(typing.cast(type, hint), f"{name}.")
    return found


def _words(hint: Any) -> tuple[str, tuple[str, ...]]:
    """A type in words, and its values where they are few."""
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return f"list of {_words(item)[0]}s", ()
    if dataclasses.is_dataclass(hint):
        return "section", ()
    if isinstance(hint, type) and issubclass(hint, Enum):
        names = tuple(member.name for member in hint)
        return " | ".join(names), names
    return _WORDS.get(hint, "any"), ("true", "false") if hint is bool else ()


@lru_cache
def _texts(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass and of its bases, as one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        file = sys.modules[base.__module__].__file__
        assert file is not None
        found |= _class_texts(Path(file)).get(base.__name__, {})
    return found


@lru_cache
def _class_texts(file: Path) -> dict[str, dict[str, str]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: _under_fields(node) for node in classes}


def _under_fields(node: ast.ClassDef) -> dict[str, str]:
    texts = {}
    for field, below in zip(node.body, node.body[1:]):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        value = below.value if isinstance(below, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            texts[field.target.id] = " ".join(value.value.split())
    return texts


def head_comment(file: Path) -> str:
    """The comment at the top of a recipe or preset, as one paragraph; `# @package` left out."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def module_text(slug: str) -> str:
    """The docstring of a method's module: its idea, its shapes, its departures."""
    source = registry.find(slug).file.read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""
