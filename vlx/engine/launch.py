"""Starts the processes of a run: this one, or several with torchrun's environment."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vlx.core.errors import EXIT_INTERRUPTED, VlxError
from vlx.engine import rundir
from vlx.engine.failure import REPORT_ENV, Failure

_GRACE_SECONDS = 10.0
_WORKER = [sys.executable, "-m", "vlx.engine.worker"]


def launch(run_dir: Path, launcher: dict) -> int:
    """Execute the run of a directory under its `launcher` section; returns an exit code."""
    if launcher["name"] == "local":
        if launcher["processes"] != 1:
            raise VlxError("launcher=local is one process; use launcher=torchrun for more")
        from vlx.engine.run import execute

        return execute(run_dir)
    return _spawn(run_dir, launcher)


class WorkerError(VlxError):
    """A process of a distributed run failed; carries that process's exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    report: int
    """Read end of the pipe through which it says why it failed."""


def _spawn(run_dir: Path, launcher: dict) -> int:
    local, nodes = launcher["processes"], launcher["nodes"]
    if nodes > 1 and not launcher["port"]:
        raise VlxError("launcher.port is needed with several nodes: the same free port on all")
    base = dict(
        os.environ,
        WORLD_SIZE=str(local * nodes),
        LOCAL_WORLD_SIZE=str(local),
        MASTER_ADDR=launcher["address"],
        MASTER_PORT=str(launcher["port"] or _free_port()),
    )
    workers = []
    for local_rank in range(local):
        rank = launcher["node_rank"] * local + local_rank
        reader, writer = os.pipe()
        env = dict(base, RANK=str(rank), LOCAL_RANK=str(local_rank))
        env[REPORT_ENV] = str(writer)
        # Own process groups: a terminal's Ctrl-C reaches the workers once, through us.
        process = subprocess.Popen(
            [*_WORKER, str(run_dir)], env=env, start_new_session=True, pass_fds=(writer,)
        )
        os.close(writer)
        workers.append(_Worker(rank, process, reader))
    _supervise([worker.process for worker in workers])
    failures = [found for worker in workers if (found := _failure_of(worker, run_dir))]
    if failures:
        # A process whose peer is gone fails too: the first to fail for its own reason counts.
        first = min(failures, key=lambda failure: (failure.lost_peer, failure.time))
        _mark_failed(run_dir, first.message)
        raise WorkerError(first.message, first.exit_code)
    return max(worker.process.returncode for worker in workers)


def _supervise(workers: list[subprocess.Popen[bytes]]) -> None:
    """Wait for all; pass signals on; when one fails, stop the others."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            _signal_all(workers, signal.SIGKILL)
            os._exit(128 + signal.SIGINT)
        _signal_all(workers, number)

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    previous = {number: signal.signal(number, forward) for number in watched}
    try:
        failed_at: float | None = None
        while any(worker.poll() is None for worker in workers):
            time.sleep(0.05)
            codes = [worker.poll() for worker in workers]
            if failed_at is None and any(code not in (None, 0, EXIT_INTERRUPTED) for code in codes):
                failed_at = time.monotonic()
            # The others notice a lost peer by themselves, or hang in the exchange with it.
            if failed_at is not None and time.monotonic() - failed_at > _GRACE_SECONDS:
                _signal_all(workers, signal.SIGKILL)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _failure_of(worker: _Worker, run_dir: Path) -> Failure | None:
    """Why a finished worker failed, or None. One that was killed could not say it."""
    os.set_blocking(worker.report, False)
    try:
        text = os.read(worker.report, 65536)
    except BlockingIOError:  # an orphaned data worker still holds the other end
        text = b""
    finally:
        os.close(worker.report)
    code = worker.process.returncode
    if code in (0, EXIT_INTERRUPTED):
        return None
    if text:
        return Failure(**json.loads(text))
    if code < 0:
        reason, code = f"was killed by {signal.Signals(-code).name}", 128 - code
    else:
        reason = f"ended with code {code}"
    log_file = run_dir / rundir.log_file(worker.rank)
    message = f"process {worker.rank} {reason}; its log is {log_file}"
    # Killed by us, after another's failure, it has nothing to say.
    return Failure(message, code, time=math.inf, lost_peer=False)


def _mark_failed(run_dir: Path, message: str) -> None:
    """Correct run.json, unless another command holds the run or its disk is full."""
    try:
        with rundir.locked(run_dir):
            record = rundir.read_record(run_dir)
            record.state, record.message = "failed", message
            record.write(run_dir)
    except VlxError:
        pass


def _signal_all(workers: list[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_launcher(run_dir: Path) -> dict:
    """The launcher section of a run's frozen configuration."""
    from vlx.engine.load import read_config

    return json.loads(json.dumps(read_config(run_dir)["launcher"]))
