"""How several processes of a run are started, watched and ended: with workers of one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine.processes import make_run
from vlx.core.errors import VlxError
from vlx.engine import launch, rundir
from vlx.engine.launch import WorkerError

LAUNCHER = {
    "name": "torchrun", "processes": 2, "nodes": 1, "node_rank": 0, "address": "127.0.0.1",
    "port": 0,
}  # fmt: skip
PREAMBLE = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from vlx.engine.failure import Failure, report
rank = int(os.environ["RANK"])
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path, "run", "launcher=torchrun")


def workers(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let every worker run a script, which knows its `rank`, in place of a training process."""
    code = PREAMBLE.format(root=str(ROOT)) + textwrap.dedent(script)
    monkeypatch.setattr(launch, "_WORKER", [sys.executable, "-c", code])


def test_environment_is_torchruns(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR")
    workers(
        monkeypatch,
        f"""
        port = int(os.environ["MASTER_PORT"])
        values = [os.environ[k] for k in {keys}]
        open({str(tmp_path)!r} + f"/{{rank}}", "w").write(" ".join(values))
        """,
    )
    assert launch.launch(run_dir, LAUNCHER) == 0
    assert [(tmp_path / r).read_text() for r in "01"] == ["2 2 0 0 127.0.0.1", "2 2 1 1 127.0.0.1"]


def test_first_failure_is_told_and_not_those_that_it_caused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers(
        monkeypatch,
        """
        if rank == 0:
            report(Failure("Connection closed by peer", 1, time=1.0, lost_peer=True)); sys.exit(1)
        report(Failure("the disk is full", 2, time=2.0)); sys.exit(2)
        """,
    )
    with pytest.raises(WorkerError, match=r"^the disk is full$") as caught:
        launch.launch(run_dir, LAUNCHER)
    assert caught.value.exit_code == 2
    assert rundir.read_record(run_dir).state == "failed"
    assert rundir.read_record(run_dir).message == "the disk is full"


def test_the_same_mistake_on_every_process_is_told_once(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers(monkeypatch, 'report(Failure("batch_size=7", 2)); sys.exit(2)')
    with pytest.raises(WorkerError, match=r"^batch_size=7$"):
        launch.launch(run_dir, LAUNCHER)


def test_killed_worker_is_named_and_a_hanging_one_ended(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.2)
    workers(
        monkeypatch,
        """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        """,
    )
    with pytest.raises(WorkerError, match="was killed by SIGKILL") as caught:
        launch.launch(run_dir, LAUNCHER)
    assert caught.value.exit_code == 128 + 9


def test_refused_second_command_leaves_the_state_of_the_first(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that holds the run is another process: locks are a process's own."""
    hold = (
        "from vlx.engine.rundir import locked; from pathlib import Path; import sys\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, str(run_dir)], cwd=ROOT, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(VlxError, match="in use by another process"), rundir.locked(run_dir):
            pass
        workers(monkeypatch, 'report(Failure("in use", 2)); sys.exit(2)')
        with pytest.raises(WorkerError, match="in use"):
            launch.launch(run_dir, LAUNCHER)
        assert rundir.read_record(run_dir).state == "created"
        other.kill()
    with rundir.locked(run_dir):  # the kernel took the lock back at once
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signals_reach_every_worker(
    number: signal.Signals, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = str(run_dir / "ready")  # a busy machine starts the first worker long after the second
    workers(
        monkeypatch,
        f"""
        for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(n, lambda *_: os._exit(75))
        if rank == 0:
            open({ready!r}, "w").close()
        if rank == 1:
            while not os.path.exists({ready!r}):
                time.sleep(0.01)
            os.kill(os.getppid(), signal.Signals({int(number)}))
        time.sleep(60)
        """,
    )
    before = signal.getsignal(number)
    started = time.monotonic()
    assert launch.launch(run_dir, LAUNCHER) == 75
    assert time.monotonic() - started < 50  # they slept no minute
    assert signal.getsignal(number) is before


def test_workers_stop_when_their_parent_is_killed(tmp_path: Path) -> None:
    """SIGKILL to the command: the kernel sends SIGTERM to its workers, which save."""
    reader, writer = os.pipe()
    child = (
        "import os, signal, sys, time; from vlx.engine.worker import _stop_with_parent\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); _stop_with_parent()\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]], pass_fds=(int(sys.argv[2]),))\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", parent, child, str(writer)]
    with subprocess.Popen(command, cwd=ROOT, pass_fds=(writer,), stdout=subprocess.PIPE) as process:
        os.close(writer)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
    assert os.read(reader, 1) == b""  # the other end closes when the grandchild has ended
    os.close(reader)


def test_local_launcher_refuses_several_processes(run_dir: Path) -> None:
    with pytest.raises(VlxError, match="launcher=torchrun"):
        launch.launch(run_dir, {**LAUNCHER, "name": "local"})
