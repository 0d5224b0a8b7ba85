"""Runs inside the test's own process: the quickest way to a checkpoint, and to its faults."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from vlx.core.errors import EXIT_INTERRUPTED
from vlx.core.plain import PlainConsole
from vlx.engine.run import execute


def run_here(run_dir: Path) -> tuple[int, str]:
    """Execute a run and return its exit code and what it printed."""
    console = PlainConsole(file=io.StringIO(), width=200)
    code = execute(run_dir, console=console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def stop_after(monkeypatch, step: int) -> None:
    """Raise the stop flag of every run at a step, as a signal would."""
    import signal

    from vlx.engine.loop import Trainer

    original = Trainer._gradients

    def gradients(self: Trainer, at: int, *args):
        if at + 1 == step:
            self.hooks.stop.signal = signal.SIGTERM
        return original(self, at, *args)

    monkeypatch.setattr(Trainer, "_gradients", gradients)


def interrupt(run_dir: Path, step: int) -> None:
    """Execute a run as far as a step, where it saves and ends as after a signal."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step)
        assert run_here(run_dir)[0] == EXIT_INTERRUPTED
