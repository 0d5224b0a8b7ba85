"""Starts the processes of a run: this one, or several with torchrun's environment."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from vlx.core.errors import EXIT_INTERRUPTED, VlxError

WORKER_ENV = "VLX_WORKER"
_GRACE_SECONDS = 45.0


def launch(run_dir: Path, launcher: dict) -> int:
    """Execute the run of a directory under its `launcher` section; returns an exit code."""
    if launcher["name"] == "local":
        if launcher["processes"] != 1:
            raise VlxError("launcher=local is one process; use launcher=torchrun for more")
        from vlx.engine.run import execute

        return execute(run_dir)
    return _spawn(run_dir, launcher)


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
    base[WORKER_ENV] = "1"
    workers = []
    for local_rank in range(local):
        rank = launcher["node_rank"] * local + local_rank
        env = dict(base, RANK=str(rank), LOCAL_RANK=str(local_rank))
        command = [sys.executable, "-m", "vlx.engine.worker", str(run_dir)]
        # Own process groups: a terminal's Ctrl-C reaches the workers once, through us.
        workers.append(subprocess.Popen(command, env=env, start_new_session=True))
    return _supervise(workers)


def _supervise(workers: list[subprocess.Popen[bytes]]) -> int:
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
                _signal_all(workers, signal.SIGTERM)
            if failed_at is not None and time.monotonic() - failed_at > _GRACE_SECONDS:
                _signal_all(workers, signal.SIGKILL)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return worst([worker.returncode for worker in workers])


def worst(codes: list[int]) -> int:
    """One exit code for several processes: a failure before an interruption before success."""
    failures = [code for code in codes if code not in (0, EXIT_INTERRUPTED)]
    if failures:
        code = next((c for c in failures if c > 1), failures[0])
        return 128 - code if code < 0 else code
    return max(codes)


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
