"""The run directory: what is in it, who writes it, and which state the run is in."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlx.core.errors import ConfigError, StorageError, VlxError
from vlx.core.files import parse_json, write_json
from vlx.core.names import folder_names
from vlx.core.results import FILE_NAME

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
STATES = ("created", "running", "finished", "interrupted", "failed")
# Keys that may differ between two runs whose numbers are comparable, and may change on resume.
HARMLESS_KEYS = (
    "runs_dir",
    "name",
    "track",
    "launcher",
    "data.workers",
    "eval.cache_features",
    "train.log_every",
    "train.threads",
    "train.checkpoint_every",
    "train.keep_last",
)


@dataclass(kw_only=True)
class RunRecord:
    """`run.json`: where a run came from and how it stands."""

    schema_version: int = 1
    id: str
    command: str
    method: str
    preset: str
    seed: int
    argv: list[str]
    overrides: list[str]
    config_hash: str
    commit: str
    versions: dict[str, str]
    created: str
    state: str = "created"
    step: int = 0
    total_steps: int = 0
    message: str = ""
    sweep: str | None = None
    wandb_id: str = field(default_factory=lambda: secrets.token_hex(4))

    def write(self, run_dir: Path) -> None:
        write_json(run_dir / RUN_FILE, asdict(self))


def read_record(run_dir: Path) -> RunRecord:
    """`run.json` of a run directory; raises `VlxError` for a directory that is none."""
    try:
        return RunRecord(**parse_json((run_dir / RUN_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        text = f"{run_dir} is not a run directory (no {RUN_FILE}). `vlx runs` lists runs"
        raise VlxError(text) from None
    except (OSError, ValueError, TypeError) as error:
        raise VlxError(f"{run_dir / RUN_FILE} is not a run of vlx: {error}") from error


def log_file(rank: int) -> str:
    """Name of a process's log in the run directory."""
    return "log.txt" if rank == 0 else f"log-rank{rank}.txt"


def now() -> str:
    """UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def config_hash(config: dict[str, Any]) -> str:
    """Digest of everything in a config that can change a number; 12 hex digits."""
    flat = {k: v for k, v in flatten(config).items() if not is_harmless(k)}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:12]


def is_harmless(key: str) -> bool:
    """Whether a dotted key may change on resume."""
    return any(key == free or key.startswith(free + ".") for free in HARMLESS_KEYS)


def check_same_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to resume under a changed config, with the difference."""
    old, new = flatten(saved), flatten(current)
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not is_harmless(key)
    ]
    if changed:
        raise ConfigError(
            f"the checkpoint was made with another configuration ({'; '.join(changed[:5])}). "
            "Undo the change, or start a new run with encoder.checkpoint=RUN"
        )


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay values."""
    if not isinstance(config, dict):
        return {prefix: config}
    result: dict[str, Any] = {}
    for key, value in config.items():
        result.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return result


def make_run_dir(runs_dir: str, name: str | None, slug: str, seed: int) -> Path:
    """A new directory; an existing one, or an unwritable parent, raises `VlxError`.

    The name of a run that failed before its first checkpoint is free again: there is nothing to go
    on with.
    """
    root = Path(runs_dir).expanduser()
    names = folder_names(name, f"{datetime.now():%Y%m%d-%H%M%S}-{slug}-s{seed}")
    for candidate in names:
        path = root / candidate
        try:
            if name is not None and _came_to_nothing(path):
                shutil.rmtree(path)
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise StorageError(f"cannot make {path}: {error.strerror}. Set runs_dir=DIR") from error
    raise VlxError(f"{root / names[0]} exists. `vlx resume` goes on with it; or choose name=OTHER")


def _came_to_nothing(run_dir: Path) -> bool:
    """Whether a run failed here and left neither weights nor numbers."""
    if not (run_dir / RUN_FILE).is_file() or is_locked(run_dir):
        return False
    left = any((run_dir / name).exists() for name in ("checkpoints", "metrics.jsonl", FILE_NAME))
    return read_record(run_dir).state == "failed" and not left


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; a second process on it raises `VlxError` at once.

    The kernel frees the lock when this process dies, so a killed run leaves none behind. It is a
    POSIX lock, which forked children do not share: data workers that outlive a killed run by some
    seconds do not hold it.
    """
    try:
        descriptor = os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write in {run_dir}: {error.strerror}") from error
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise VlxError(
                f"{run_dir} is in use by another process; wait for it or choose another run"
            ) from None
        yield
    finally:
        os.close(descriptor)


def is_locked(run_dir: Path) -> bool:
    """Whether another process holds the run directory. Asks without taking the lock.

    Never call it in the process that holds the lock: closing the file would free it.
    """
    try:
        descriptor = os.open(run_dir / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, asked)
        return struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK
    finally:
        os.close(descriptor)
