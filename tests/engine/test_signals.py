"""FIELD-NOTES section 4, test 9: SIGTERM, SIGINT and SIGUSR2 save and end with code 75."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine.compare import assert_same_bits, final
from tests.engine.processes import Kill, execute, finish, make_run, output, start
from vlx.core.errors import EXIT_INTERRUPTED
from vlx.engine.rundir import read_record

pytestmark = pytest.mark.slow

OVERRIDES = ("train.steps=10", "train.checkpoint_every=100", "eval.at_end=[knn,linear-probe]")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("reference"), "whole", *OVERRIDES)
    execute(run_dir)
    return run_dir


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signal_saves_prints_the_resume_command_and_exits_75(
    number: signal.Signals, reference: Path, tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path, "stopped", *OVERRIDES, "data.resident=never")
    process = start(run_dir, Kill("step", 4, number))
    finish(process, run_dir, code=EXIT_INTERRUPTED)
    assert f"vlx resume {run_dir}" in output(run_dir)
    record = read_record(run_dir)
    assert record.state == "interrupted"
    assert number.name in record.message
    assert final(run_dir).step == record.step == 5  # the flag is read once a step
    execute(run_dir)
    assert_same_bits(run_dir, reference)


def _two_interrupts() -> None:
    from vlx.engine.loop import Trainer

    def twice(trainer: Trainer, step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    Trainer._apply = twice  # type: ignore[method-assign]


def test_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "left", *OVERRIDES)
    finish(start(run_dir, before=_two_interrupts), run_dir, code=128 + signal.SIGINT)
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.parametrize("call", [1, 4], ids=["untrained", "at the end"])
def test_signal_during_an_evaluation_stops_before_the_next(
    call: int, reference: Path, tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path, "stopped", *OVERRIDES)
    process = start(run_dir, Kill("evaluator", call, signal.SIGTERM))
    finish(process, run_dir, code=EXIT_INTERRUPTED)
    assert not (run_dir / "results.json").exists()
    execute(run_dir)
    assert_same_bits(run_dir, reference)


def _wait_for_records(run_dir: Path, count: int) -> None:
    file = run_dir / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if file.exists() and file.read_text().count("\n") >= count:
            return
    pytest.fail("the run logged nothing")


def test_signal_to_the_command_of_a_distributed_run(tmp_path: Path) -> None:
    words = ("train.steps=1000000", "launcher=torchrun", "eval.at_end=[]", "data.workers=0")
    run_dir = make_run(tmp_path, "stopped", *words)
    command = [sys.executable, "-m", "vlx", "resume", str(run_dir)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        _wait_for_records(run_dir, 3)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
        assert time.monotonic() - asked < 30
    assert process.returncode == EXIT_INTERRUPTED, printed
    assert printed.count("vlx resume") == 1
    record = read_record(run_dir)
    assert record.state == "interrupted"
    assert final(run_dir).step == record.step
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == record.step


def test_terminal_interrupt_reaches_data_workers_too_and_still_saves(tmp_path: Path) -> None:
    """Ctrl-C and batch systems signal the whole process group, data workers included."""
    words = ("train.steps=1000000", "data.resident=never", "eval.at_end=[]", "data.workers=2")
    run_dir = make_run(tmp_path, "stopped", *words)
    process = start(run_dir, before=os.setpgrp)
    _wait_for_records(run_dir, 3)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGTERM)
    finish(process, run_dir, code=EXIT_INTERRUPTED)
    assert final(run_dir).step == read_record(run_dir).step
