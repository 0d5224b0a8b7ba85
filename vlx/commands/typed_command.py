"""`data.path=pipe:COMMAND`: run where it is typed, before anything reads the data."""

from __future__ import annotations

from collections.abc import Sequence

from vlx.config.overrides import parse
from vlx.data.config import DataConfig
from vlx.data.fetch import COMMAND, fetch_shards
from vlx.data.shards import not_fetched


def run_typed_command(data: DataConfig, overrides: Sequence[str]) -> None:
    """Keep the output of the commands that `data.path` names, where an override says so.

    Everything that opens data finds it in the cache and runs no command itself, so that none comes
    from a run's frozen configuration or a preset. Raises `DataError` where one would.
    """
    if data.path is None or COMMAND not in data.path:
        return
    typed = [o.value() for o in parse(overrides) if o.key_or_group == "data.path"]
    commands = [place for place in not_fetched(data) if place.startswith(COMMAND)]
    fetch_shards(commands, run_commands=data.path in typed)
