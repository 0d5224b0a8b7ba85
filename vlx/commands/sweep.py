"""Runs the jobs of a sweep, each in a process of its own, and goes on where one was stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from vlx.commands.start import prepare
from vlx.commands.summary import summarise
from vlx.commands.sweep_file import (
    DONE,
    Job,
    at_work,
    code_of,
    read_jobs,
    standing,
    worst,
    write_jobs,
)
from vlx.core.errors import EXIT_INTERRUPTED
from vlx.engine import rundir

CONSOLE_FILE = "console.txt"
_POLL_SECONDS = 0.1


class Adopted:
    """A job that a killed driver left running: followed by the lock that it holds."""

    def __init__(self, directory: Path, job: Job) -> None:
        self.directory, self.job = directory, job

    def poll(self) -> int | None:
        state = standing(self.directory, self.job)
        return None if state == "running" else code_of(state)

    def send_signal(self, number: int) -> None:
        """It is not ours to stop."""


@dataclass
class Running:
    """A job at work."""

    job: Job
    process: subprocess.Popen[bytes] | Adopted
    started: float
    told: int | None = None
    """The last signal that it was sent."""


class Driver:
    """Keeps up to `parallel` jobs at work until all are done or it is told to stop."""

    def __init__(
        self, directory: Path, console: Console, *, parallel: int = 1, fail_fast: bool = False
    ) -> None:
        self.directory, self.console = directory, console
        self.parallel, self.fail_fast = parallel, fail_fast
        self.jobs = read_jobs(directory)
        self.waiting: list[Job] = []
        self.running: list[Running] = []
        self.stop_signal: int | None = None
        """What the jobs at work are told; None while nothing asked to stop."""

    def run(self) -> int:
        """Run what is missing or failed; print the tables. Returns the worst exit code."""
        with rundir.locked(self.directory):
            self.waiting = [job for job in self.jobs if not self._is_done(job)]
            if len(self.waiting) < len(self.jobs):
                self._say(f"{len(self.jobs) - len(self.waiting)} of {len(self.jobs)} jobs are done")
            with self._signals():
                while self.running or self._may_start():
                    if self._may_start() and len(self.running) < self.parallel:
                        self._start(self.waiting.pop(0))
                        continue
                    time.sleep(_POLL_SECONDS)
                    self._pass_on_stop()
                    self._collect()
            summarise(self.directory, self.jobs, self.console)
        code = worst([0 if j.state == DONE else j.exit_code or EXIT_INTERRUPTED for j in self.jobs])
        if code:
            self._say(f"not all jobs finished. To run the rest: vlx sweep {self.directory}")
        return code

    def _may_start(self) -> bool:
        return bool(self.waiting) and self.stop_signal is None

    def _is_done(self, job: Job) -> bool:
        job.state = standing(self.directory, job)
        if job.state == DONE:
            job.exit_code = 0
        return job.state == DONE

    def _start(self, job: Job) -> None:
        number = self.jobs.index(job) + 1
        process = Adopted(self.directory, job) if job.state == "running" else self._launch(job)
        again = " (already at work)" if isinstance(process, Adopted) else ""
        self._say(f"[{number}/{len(self.jobs)}] {job.id} started{again}")
        job.state, job.exit_code = "running", None
        self.running.append(Running(job, process, time.monotonic()))
        write_jobs(self.directory, self.jobs)

    def _launch(self, job: Job) -> subprocess.Popen[bytes]:
        run_dir = self.directory / job.run_dir
        if not (run_dir / rundir.RUN_FILE).is_file():
            prepare(job.config, job.overrides, sweep=self.directory.name, run_dir=run_dir)
        env = dict(os.environ)
        if self.parallel > 1:  # the jobs share the cores
            threads = max(1, len(os.sched_getaffinity(0)) // self.parallel)
            env.setdefault("OMP_NUM_THREADS", str(threads))
        with (run_dir / CONSOLE_FILE).open("ab") as output, at_work(run_dir) as lock:
            # Its own process group: a terminal's Ctrl-C reaches the job once, through us.
            return subprocess.Popen(
                job_command(run_dir),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                start_new_session=True,
                pass_fds=(lock,),
            )

    def _collect(self) -> None:
        """File the jobs that have ended."""
        for work in list(self.running):
            code = work.process.poll()
            if code is None:
                continue
            self.running.remove(work)
            job = work.job
            job.exit_code = worst([code])
            job.state = standing(self.directory, job, ended=True)
            if job.state != DONE and isinstance(work.process, Adopted):
                self.waiting.insert(0, job)  # the job of a driver before us: ours to run again
                continue
            if code != 0 and job.state in (DONE, "pending", "created"):
                job.state = "failed"
            write_jobs(self.directory, self.jobs)
            self._say(self._ending(job, time.monotonic() - work.started))
            if job.state != DONE and self.fail_fast and self.stop_signal is None:
                self.stop_signal = signal.SIGTERM

    def _ending(self, job: Job, seconds: float) -> str:
        line = f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {job.id} {job.state}"
        line += f" after {seconds:.0f} s"
        if job.state == DONE:
            return line
        output = self.directory / job.run_dir / CONSOLE_FILE
        said = output.read_text(errors="replace").strip() if output.is_file() else ""
        last = said.splitlines()[-1] if said else f"exit code {job.exit_code}"
        return f"{line}: {last} ({output})"

    def _pass_on_stop(self) -> None:
        """Tell the jobs at work to save and end, once asked to stop.

        Not from the signal's handler: a job that is just being started would not be told.
        """
        for work in self.running:
            if self.stop_signal is not None and work.told != self.stop_signal:
                work.told = self.stop_signal
                work.process.send_signal(self.stop_signal)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        received: list[int] = []

        def handle(number: int, frame: FrameType | None) -> None:
            received.append(number)
            again = received.count(signal.SIGINT) > 1
            self.stop_signal = signal.SIGKILL if again else signal.SIGTERM

        watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
        previous = {number: signal.signal(number, handle) for number in watched}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def job_command(run_dir: Path) -> list[str]:
    """What runs a prepared run directory on its frozen configuration."""
    return [sys.executable, "-m", "vlx", "resume", str(run_dir)]


def go_on(directory: Path, console: Console, *, parallel: int, fail_fast: bool) -> int:
    """`vlx sweep DIR`: run the jobs of a sweep that are missing or failed."""
    return Driver(directory, console, parallel=parallel, fail_fast=fail_fast).run()
