"""Runs in real processes that cost no imports: forked from a server that has made them already.

A child may be told to kill itself with SIGKILL at an exact place: the kernel ends it there, with
no chance to clean up, as it would for `kill -9`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from vlx.commands.start import prepare
from vlx.config.compose import compose
from vlx.core import registry
from vlx.core.errors import EXIT_OK, VlxError

PRELOAD = [
    "vlx.engine.run",
    "vlx.engine.worker",
    "vlx.engine.signals",
    "vlx.methods.mae",
    "vlx.data.sources.digits",
    "vlx.evals.knn",
    "vlx.evals.probe",
    "vlx.evals.reconstruction",
    "tests.engine.processes",
]


def forkserver() -> ForkServerContext:
    """The context whose server has imported torch and vlx once for all children."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@dataclass(frozen=True)
class Kill:
    """Where a child kills itself: at the `at`-th call (from 1) of a place."""

    place: str
    """micro (inside a step), step (after one), write, sync, rename, prune (inside a save),
    evaluator (before an evaluation), evaluate (inside one), log (after a record)."""
    at: int
    number: int = signal.SIGKILL
    """The signal; other than SIGKILL the process may answer it."""


def make_run(
    folder: Path, name: str, *overrides: str, preset: str = "smoke", slug: str = "mae"
) -> Path:
    """A prepared run, of MAE on the digits unless told otherwise; nothing is executed."""
    words = ["track=none", f"runs_dir={folder}", f"name={name}", "train.threads=1", *overrides]
    command = registry.find(slug).paper.commands[0]
    return prepare(compose(slug, command, preset, words), words)


def start(
    run_dir: Path,
    kill: Kill | None = None,
    *,
    env: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> ForkServerProcess:
    """Start a child that executes a run; its output goes to RUN/child.txt."""
    process = forkserver().Process(target=_child, args=(run_dir, kill, env or {}, before))
    process.start()
    return process


def finish(process: ForkServerProcess, run_dir: Path, *, code: int | None = EXIT_OK) -> int:
    """Wait for a child and check its exit code; shows its output when it is another."""
    process.join(timeout=240)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"a child hung; it wrote: {output(run_dir)}")
    if code is not None:
        assert process.exitcode == code, output(run_dir)
    return process.exitcode


def execute(run_dir: Path, kill: Kill | None = None, **kwargs: Any) -> int:
    """Run a child to its end. With a SIGKILL it must die of it."""
    process = start(run_dir, kill, **kwargs)
    killed = kill is not None and kill.number == signal.SIGKILL
    return finish(process, run_dir, code=-signal.SIGKILL if killed else EXIT_OK)


def start_world(
    run_dir: Path,
    world: int = 2,
    kills: dict[int, Kill] | None = None,
    before: Callable[[], None] | None = None,
) -> list[ForkServerProcess]:
    """Start the processes of a distributed run, as `launcher=torchrun` would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [
        start(run_dir, (kills or {}).get(rank), env={**common, **own}, before=before)
        for rank, own in enumerate(ranks)
    ]


def execute_world(run_dir: Path, world: int = 2) -> None:
    for process in start_world(run_dir, world):
        finish(process, run_dir)


def output(run_dir: Path) -> str:
    return "\n".join(f.read_text() for f in sorted(run_dir.glob("child*.txt")))


def relaunch(run_dir: Path, **changes: Any) -> None:
    """Change harmless keys of a run's frozen configuration, as a user with an editor would."""
    import yaml

    file = run_dir / "config.yaml"
    values = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    file.write_text(yaml.safe_dump(values))


def _child(
    run_dir: Path, kill: Kill | None, env: dict[str, str], before: Callable[[], None] | None
) -> None:
    os.environ.update(env)
    # A forkserver's child would start data workers by the forkserver too.
    multiprocessing.set_start_method("fork", force=True)
    rank = env.get("RANK", "")
    stream = (run_dir / f"child{rank}.txt").open("a", buffering=1)
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    sys.stdout = sys.stderr = stream
    from vlx.engine.run import execute as execute_run

    try:
        if kill is not None:
            _arm(kill)
        if before is not None:
            before()
        code = execute_run(run_dir)
    except VlxError as error:
        print(f"error: {error}")
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 1
    stream.flush()
    os._exit(code)


def _arm(kill: Kill) -> None:
    """Make the process send itself the signal at the wanted place."""
    import safetensors.torch as _  # noqa: F401 - imported before it is patched

    from vlx.engine import checkpoint, ema, evaluate, loop
    from vlx.evals import features
    from vlx.track.jsonl import JsonlTrack

    places = {
        "micro": (loop.StepRecord, "add"),
        "step": (loop.Trainer, "_apply"),
        "ema": (ema.Ema, "update"),
        "write": (checkpoint, "save_file"),
        "sync": (checkpoint, "_sync"),
        "rename": (checkpoint, "_replace"),
        "prune": (checkpoint, "prune"),
        "evaluate": (features, "_first_occurrences"),
        "evaluator": (evaluate, "evaluator"),
        "log": (JsonlTrack, "log"),
    }
    owner, name = places[kill.place]
    original = getattr(owner, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **kwargs) if kill.place not in ("rename", "prune") else None
        if calls == kill.at:
            os.kill(os.getpid(), kill.number)
        return original(*args, **kwargs) if kill.place in ("rename", "prune") else result

    setattr(owner, name, deadly)


def loss_records(run_dir: Path) -> list[dict[str, float]]:
    """What must be equal between two runs: losses, sample hashes and rates by step."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    wanted = ("step", "train/", "optim/")
    return [
        {key: value for key, value in record.items() if key.startswith(wanted)}
        for record in records
        if "train/loss" in record
    ]
