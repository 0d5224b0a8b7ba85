"""Shell completion of methods, presets, keys and values. Imports neither torch nor hydra.

typer calls these with the command line read so far in `ctx`; its own `args` list is always empty.
bash breaks words at `=`, so what comes after one may arrive as a word of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from vlx.config.paths import GROUPS, group_options, presets
from vlx.core import registry
from vlx.core.paper import COMMANDS
from vlx.core.plain import plain


class TypedWords(Protocol):
    """What typer's context holds of the words typed so far."""

    params: dict[str, Any]
    args: list[str]
    info_name: str | None


_NOT_KEYS = ("command", "slug", "preset", "teacher")
_EVALUATION_SECTIONS = ("encoder.", "data.", "eval.", "launcher.", "runs_dir", "name", "seed")


def methods(ctx: TypedWords, incomplete: str) -> list[tuple[str, str]]:
    """Methods of the command being typed, with their titles."""
    found, _ = registry.scan()
    command = {"pretrain": "pretrain-mim"}.get(ctx.info_name or "", ctx.info_name)
    names = {
        slug: entry.paper.title
        for slug, entry in found.items()
        if command not in COMMANDS or command in entry.paper.commands
    }
    if command == "eval":
        from vlx.evals.registry import EVALUATORS

        names |= {name: meaning for name, (_, _, meaning) in EVALUATORS.items()}
    return [(name, text) for name, text in names.items() if name.startswith(incomplete)]


def preset_names(ctx: TypedWords, incomplete: str) -> list[str]:
    """Presets of the method already on the line."""
    return [name for name in presets(_method(ctx)) if name.startswith(incomplete)]


def overrides(ctx: TypedWords, incomplete: str) -> list[str]:
    """`key=`, `group=`, and the values that they take."""
    words = list(ctx.params.get("rest") or [])
    key, equals, value = incomplete.partition("=")
    if equals and key:  # one word, as zsh and fish give it
        return [f"{key}={option}" for option in _values(_method(ctx), key, value)]
    if _typed_equals() and words:  # typer gives the callback "" for a word "="
        return _values(_method(ctx), words[-1], "")
    if len(words) > 1 and words[-1] == "=":
        return _values(_method(ctx), words[-2], incomplete)
    if words and words[-1].endswith("="):
        return _values(_method(ctx), words[-1].rstrip("="), incomplete)
    names = [*_keys(_method(ctx)), *_groups(_method(ctx))]
    return [f"{name}=" for name in names if name.startswith(incomplete)]


def run_dirs(ctx: TypedWords, incomplete: str) -> list[str]:
    """Run directories under runs/."""
    folders = [*Path("runs").glob("*/run.json"), *Path("runs/sweeps").glob("*/*/run.json")]
    return _typeable((file.parent for file in sorted(folders)), incomplete)


def sweep_dirs(ctx: TypedWords, incomplete: str) -> list[str]:
    """Sweep directories under runs/."""
    files = sorted(Path("runs/sweeps").glob("*/sweep.jsonl"))
    return _typeable((file.parent for file in files), incomplete)


def _typeable(folders: Iterable[Path], incomplete: str) -> list[str]:
    """Those that begin so; not what a terminal would obey where the shell lists it."""
    names = map(str, folders)
    return [name for name in names if name.startswith(incomplete) and plain(name) == name]


def _typed_equals() -> bool:
    """Whether the word being completed is a lone `=`, in bash's own variables."""
    words, at = os.environ.get("COMP_WORDS", "").split(), os.environ.get("COMP_CWORD", "")
    return at.isdecimal() and int(at) < len(words) and words[int(at)] == "="


def _method(ctx: TypedWords) -> str:
    # Behind an option that still waits for its value, typer leaves all words in `args`.
    return str(ctx.params.get("method") or next(iter(ctx.args), ""))


def _is_method(slug: str) -> bool:
    return slug in registry.papers()


def _keys(slug: str) -> dict[str, tuple[str, ...]]:
    """Dotted keys with the values of those that have few."""
    from vlx.config.meanings import describe, describe_run

    if _is_method(slug):
        described = describe(slug).items()
        return {name: key.choices for name, key in described if name not in _NOT_KEYS}
    keys = {name: key.choices for name, key in describe_run().items()}
    return {name: found for name, found in keys.items() if name.startswith(_EVALUATION_SECTIONS)}


def _groups(slug: str) -> Iterable[str]:
    return GROUPS if _is_method(slug) else ("encoder", "data", "launcher")


def _values(slug: str, key: str, begun: str) -> list[str]:
    options: Iterable[str] = _keys(slug).get(key, ())
    if key in GROUPS:
        options = group_options(key)
    elif key == "data.source":
        from vlx.data.open import SOURCES

        options = SOURCES
    return [option for option in options if option.startswith(begun)]
