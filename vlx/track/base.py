"""Where a run's numbers and pictures go."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Track(Protocol):
    """A sink. Steps are counts of updates done and never go back."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, name: str, file: Path) -> None: ...

    def table(self, step: int, name: str, columns: list[str], rows: list[list]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class Fanout:
    """Sends everything to every sink."""

    def __init__(self, sinks: list[Track]) -> None:
        self.sinks = sinks

    def log(self, step: int, values: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.log(step, values)

    def picture(self, step: int, name: str, file: Path) -> None:
        for sink in self.sinks:
            sink.picture(step, name, file)

    def table(self, step: int, name: str, columns: list[str], rows: list[list]) -> None:
        for sink in self.sinks:
            sink.table(step, name, columns, rows)

    def close(self, exit_code: int) -> None:
        for sink in self.sinks:
            sink.close(exit_code)
