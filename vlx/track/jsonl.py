"""metrics.jsonl: the run's own record, one JSON object a line, cut back on resume."""

from __future__ import annotations

import json
import time
from pathlib import Path

from vlx.core.files import write_atomic


class JsonlTrack:
    """Appends; what is past `resume_step` (work that a kill undid) is removed first."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resume_step]
            write_atomic(path, "".join(line + "\n" for line in kept))
        self._stream = path.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, float]) -> None:
        record = {"step": step, "time": round(time.time(), 3), **values}
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def picture(self, step: int, name: str, file: Path) -> None:
        pass

    def table(self, step: int, name: str, columns: list[str], rows: list[list]) -> None:
        pass

    def close(self, exit_code: int) -> None:
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole records of a metrics.jsonl; a last line cut by a kill is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line for line in lines[:-1] if line]
