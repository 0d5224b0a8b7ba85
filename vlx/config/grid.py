"""A static grid of a sweep, expanded by Hydra's own override parser. No torch here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override

from vlx.config.compose import Root, check, hydra_conf, plain_words, resolve
from vlx.config.overrides import parse
from vlx.core.errors import ConfigError, VlxError

PLUGIN_KEYS = ("hydra/launcher", "hydra/sweeper")
_NOT_SWEPT = {
    "name": "it names the sweep; jobs are named after what they vary",
    "runs_dir": "a sweep has one folder",
    "track.group": "a sweep is one W&B group",
}


@dataclass(frozen=True)
class Cell:
    """One job of a grid."""

    swept: dict[str, str]
    """The keys that vary over the grid with this job's values."""
    overrides: list[str]
    """All of its overrides, none of them a sweep."""
    config: dict[str, Any]
    """The resolved configuration."""


def uses_plugin(overrides: Sequence[str]) -> bool:
    """Whether a launcher or sweeper of Hydra's plugins was asked for."""
    return any(o.key_or_group in PLUGIN_KEYS for o in parse(overrides))


def expand(
    root: Root,
    overrides: Sequence[str],
    root_for: Callable[[Sequence[str]], Root] | None = None,
) -> list[Cell]:
    """Every job of the grid, composed and checked, in the order of the command line.

    root_for: the root of one job from its overrides, where jobs differ in it.

    Raises `ConfigError` for a mistake in any job, naming the job's overrides when a value that
    varies is at fault.
    """
    with hydra_conf():
        parsed = parse(plain_words(root, overrides))
        check(root, parsed)
        axes = [_values(override) for override in parsed]
        swept = [o.is_sweep_override() for o in parsed]
        if not any(swept):
            raise ConfigError("a sweep needs a key with several values, e.g. seed=0,1,2")
        cells = []
        for words in itertools.product(*axes):
            varying = [word for word, varies in zip(words, swept) if varies]
            parsed_words = parse(words)
            try:
                own = root_for(words) if root_for else root
                config = resolve(own, words, parsed_words)
            except VlxError as error:
                raise ConfigError(f"job {' '.join(varying)}: {error}") from error
            pairs = (word.split("=", 1) for word in varying)
            cells.append(
                Cell({key.lstrip("+"): _unquoted(value) for key, value in pairs}, [*words], config)
            )
    return cells


def _unquoted(value: str) -> str:
    """A value without the quotes around all of it."""
    whole = len(value) > 1 and value[0] == value[-1] == "'" and "'" not in value[1:-1]
    return value[1:-1] if whole else value


def _values(override: Override) -> list[str]:
    """`key=value` once for each value that the override takes."""
    text = override.input_line or ""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [text]
    if override.key_or_group in _NOT_SWEPT:
        raise ConfigError(f"'{text}' cannot vary: {_NOT_SWEPT[override.key_or_group]}")
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"'{text}' is not a list of values: use choice(...) or range(...), or a sweeper that "
            "draws from intervals, e.g. hydra/sweeper=optuna"
        )
    values = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not values:
        raise ConfigError(f"'{text}' matches nothing")
    return values


def job_name(number: int, swept: dict[str, str]) -> str:
    """A folder name that sorts by number and says what the job varies: `003-seed_1`.

    Without `=`, so that it can be the value of an override.
    """
    said = "-".join(f"{key.rsplit('.', 1)[-1]}_{value}" for key, value in swept.items())
    return f"{number:03d}-{re.sub(r'[^A-Za-z0-9._+-]+', '_', said)[:60]}".rstrip("-_")
