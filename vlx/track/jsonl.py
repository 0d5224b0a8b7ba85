"""metrics.jsonl: the run's own record, one JSON object a line, cut back on resume."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from vlx.core.errors import StorageError
from vlx.core.files import explain_write, parse_json, write_atomic


class JsonlTrack:
    """Appends; what is past `resume_step` (work that a kill undid) is removed first.

    Raises `StorageError` when the disk does not take a record: a run without numbers is no run.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        if path.exists():
            kept = [record for record in read_metrics(path) if record["step"] <= resume_step]
            write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(explain_write(error, path)) from error

    def log(self, step: int, values: dict[str, float]) -> None:
        record = {"step": step, "time": round(time.time(), 3), **values}
        data = (json.dumps(record) + "\n").encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise StorageError(explain_write(error, self.path)) from error

    def picture(self, step: int, name: str, file: Path) -> None:
        pass

    def table(self, step: int, name: str, columns: list[str], rows: list[list]) -> None:
        pass

    def close(self, exit_code: int) -> None:
        os.close(self._file)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole records of a metrics.jsonl; a line cut by a kill or a full disk is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records
