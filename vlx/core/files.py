"""Files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlx.core.errors import StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain_write(error: OSError, path: Path) -> str:
    """One line on why `path` cannot be written and what to do."""
    if error.errno in _FULL:
        reason = os.strerror(error.errno).lower()
        return (
            f"cannot write {path}: {reason}; the last good checkpoint is kept. "
            "Free some space and type `vlx resume` with the run's directory"
        )
    return f"cannot write {path}: {error.strerror or error}"


def system_error(error: Exception) -> OSError:
    """As an `OSError`, what a library says of one in words alone: "... (os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else 0, str(error))


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write to a temporary file beside `path`, sync, rename. A reader never sees half of it.

    Raises:
        StorageError: the disk is full or the place cannot be written; `path` is as it was.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with tmp.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(tmp, path)
    except OSError as error:
        with suppress(OSError):  # a file in place of the directory: there is nothing to remove
            tmp.unlink(missing_ok=True)
        raise StorageError(explain_write(error, path)) from error


def parse_json(text: str | bytes) -> Any:
    """`json.loads`; what is nested without end is a `ValueError` like every other fault."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=False) + "\n")
