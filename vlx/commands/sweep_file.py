"""`sweep.jsonl`: the frozen jobs of a sweep, one a line, and how they stand. Needs no torch."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlx.core.errors import EXIT_INTERRUPTED, EXIT_OK, VlxError
from vlx.core.files import parse_json, write_atomic
from vlx.core.names import check_folder_name
from vlx.core.results import FILE_NAME
from vlx.engine import rundir

SWEEP_FILE = "sweep.jsonl"
DONE = "finished"
_AT_WORK_FILE = ".job"


@dataclass(kw_only=True)
class Job:
    """One run of a sweep, as it was when the sweep was submitted."""

    id: str
    """Name of its run directory within the sweep's."""
    overrides: list[str]
    swept: dict[str, str]
    """The keys that vary over the sweep, with this job's values."""
    config: dict[str, Any]
    hash: str
    state: str = "pending"
    exit_code: int | None = None
    run_dir: str = ""
    """Relative to the sweep's directory."""


def read_jobs(directory: Path) -> list[Job]:
    """The jobs of a sweep's directory; raises `VlxError` for a directory that is none."""
    path = directory / SWEEP_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        jobs = (Job(**parse_json(line)) for line in lines if line)
        jobs = [replace(job, run_dir=check_folder_name(job.run_dir, "run_dir")) for job in jobs]
        return list({job.id: job for job in jobs}.values())  # a later line replaces an earlier
    except FileNotFoundError:
        raise VlxError(f"{directory} is not a sweep (no {SWEEP_FILE}); runs/sweeps has") from None
    except (OSError, ValueError, TypeError) as error:
        raise VlxError(f"{path} is not a sweep of vlx: {error}") from error


def write_jobs(directory: Path, jobs: list[Job]) -> None:
    """All jobs, atomically."""
    lines = (json.dumps(asdict(job)) for job in jobs)
    write_atomic(directory / SWEEP_FILE, "".join(f"{line}\n" for line in lines))


def append_job(directory: Path, job: Job) -> None:
    """Add a job, or its new state, to a sweep that several processes write (a plugin's)."""
    descriptor = os.open(directory / SWEEP_FILE, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, (json.dumps(asdict(job)) + "\n").encode())
    finally:
        os.close(descriptor)


def standing(directory: Path, job: Job, *, ended: bool = False) -> str:
    """How a job stands by its own run directory, which outlives a killed driver.

    ended: its process is known to be gone, whatever its data workers may still hold.
    """
    run_dir = directory / job.run_dir
    if not (run_dir / rundir.RUN_FILE).is_file():
        return "pending"
    state = rundir.read_record(run_dir).state
    if state == DONE and (run_dir / FILE_NAME).is_file():
        return DONE
    if not ended and (is_at_work(run_dir) or rundir.is_locked(run_dir)):
        return "running"
    return {"running": "killed", DONE: "failed"}.get(state, state)


@contextmanager
def at_work(run_dir: Path) -> Iterator[int]:
    """A locked file to start a job's process with: locked for as long as that process lives.

    The run directory's own lock comes seconds later, when torch is imported. A `flock` belongs to
    the open file, so it passes to the process that inherits it.
    """
    descriptor = os.open(run_dir / _AT_WORK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError:
        raise VlxError(f"{run_dir} is in use by another process") from None
    finally:
        os.close(descriptor)


def is_at_work(run_dir: Path) -> bool:
    """Whether the process that a driver started for a job still lives."""
    try:
        descriptor = os.open(run_dir / _AT_WORK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def code_of(state: str) -> int:
    """The exit code that a state stands for, where nobody saw the process end."""
    return {DONE: EXIT_OK, "interrupted": EXIT_INTERRUPTED, "pending": EXIT_INTERRUPTED}.get(
        state, 1
    )


def worst(codes: list[int]) -> int:
    """One exit code for many jobs: a failure before an interruption before success."""
    codes = [128 - code if code < 0 else code for code in codes]
    failures = [code for code in codes if code not in (EXIT_OK, EXIT_INTERRUPTED)]
    return max(failures or codes, default=EXIT_OK)
