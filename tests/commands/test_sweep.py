"""Sweeps: frozen jobs, one process each, nothing lost, one exit code.

Most tests put a stand-in for the job's process, which behaves by its seed and needs no torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.commands.conftest import smoke_line, text_console, text_of
from vlx.commands import sweep as sweep_module
from vlx.commands.multirun import freeze
from vlx.commands.start import prepare, start
from vlx.commands.summary import spread
from vlx.commands.sweep import Driver
from vlx.commands.sweep_file import at_work, read_jobs, standing, worst, write_jobs
from vlx.config.compose import method_root
from vlx.config.grid import expand
from vlx.core.errors import EXIT_INTERRUPTED, VlxError

# Seed 13 fails with code 3 until a file `mended` exists; 7 waits for a file `go`, or SIGTERM.
STAND_IN = """
import json, pathlib, signal, sys, time
from vlx.core.results import Metric, Results
from vlx.engine.rundir import locked, read_record
run = pathlib.Path(sys.argv[1])
record = read_record(run)
with locked(run):
    record.state = "running"; record.write(run)
    with (run / "starts").open("a") as starts: starts.write("x")
    def stop(number, frame):
        record.state = "interrupted"; record.write(run); sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    if record.seed == 13 and not (run.parent / "mended").exists():
        record.state = "failed"; record.write(run)
        print("error: seed 13"); sys.exit(3)
    while record.seed == 7 and not (run.parent / "go").exists(): time.sleep(0.01)
    metrics = [Metric(name="knn/top1", value=record.seed / 10, unit="share", split="s",
                      num_samples=1, protocol="knn@1", weights=w) for w in ("untrained", "trained")]
    Results(run=run.name, command="", method="", preset="", seed=record.seed, config_hash="",
            data_fingerprint="", weights_checksum="", steps=1, epochs=1, final_losses={},
            metrics=metrics, bad_samples=0, hardware={}, versions={}, commit="", wall_time_s=0,
            peak_memory_mb=0, finished="").write(run)
    record.state = "finished"; record.write(run)
"""


@pytest.fixture
def stand_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with jobs replaced by the stand-in."""
    command = [sys.executable, "-c", STAND_IN]
    monkeypatch.setattr(sweep_module, "job_command", lambda run_dir: [*command, str(run_dir)])
    return here


def make_sweep(folder: Path, *overrides: str) -> Path:
    """A frozen sweep of MAE's smoke preset, not yet begun."""
    folder.mkdir(parents=True)
    cells = expand(method_root("mae", "pretrain-mim", "smoke"), ["track=none", *overrides])
    write_jobs(folder, [freeze(number, cell, folder) for number, cell in enumerate(cells)])
    return folder


def states(folder: Path) -> list[str]:
    return [job.state for job in read_jobs(folder)]


def starts(folder: Path) -> list[int]:
    """How often each job was started."""
    files = [folder / job.run_dir / "starts" for job in read_jobs(folder)]
    return [len(file.read_text()) if file.exists() else 0 for file in files]


class Listening(Driver):
    """A driver that does something when it says something."""

    hear: Callable[[str], object] = staticmethod(lambda text: None)

    def _say(self, text: str) -> None:
        super()._say(text)
        self.hear(text)


def test_a_sweep_runs_every_job_and_sums_up_over_seeds(stand_in: Path) -> None:
    console = text_console()
    line = smoke_line("seed=1,2,3", "method.mask_ratio=0.5,0.75", "name=s", multirun=True, jobs=3)
    assert start(line, console) == 0
    folder = Path("runs/sweeps/s")
    jobs = read_jobs(folder)
    assert [job.id for job in jobs][:2] == [
        "000-seed_1-mask_ratio_0.5",
        "001-seed_1-mask_ratio_0.75",
    ]
    assert {job.state for job in jobs} == {"finished"}
    for job in jobs:
        config = yaml.safe_load((folder / job.run_dir / "config.yaml").read_text())
        assert config == job.config
        assert config["track"]["group"] == "s"
    summary = json.loads((folder / "sweep.json").read_text())
    assert [group["swept"] for group in summary["over_seeds"]] == [
        {"method.mask_ratio": "0.5"},
        {"method.mask_ratio": "0.75"},
    ]
    over_seeds = summary["over_seeds"][0]["metrics"]["knn/top1"]
    assert over_seeds == {"mean": pytest.approx(0.2), "std": pytest.approx(0.1), "n": 3}
    assert summary["jobs"][0]["metrics"] == {"knn/top1": 0.1}
    assert "0.2000 ± 0.1000 (3)" in text_of(console)
    assert not [path for path in Path("runs").iterdir() if path.name != "sweeps"]


def test_a_failed_job_stops_no_other_and_a_restart_runs_it_alone(stand_in: Path) -> None:
    folder, console = make_sweep(stand_in / "s", "seed=1,13,2"), text_console()
    assert Driver(folder, console).run() == 3
    assert states(folder) == ["finished", "failed", "finished"]
    assert "error: seed 13" in text_of(console)
    assert f"vlx sweep {folder}" in text_of(console)
    (folder / "mended").touch()
    assert Driver(folder, text_console()).run() == 0
    assert states(folder) == ["finished"] * 3
    assert starts(folder) == [1, 2, 1]


def test_fail_fast_starts_no_more_and_stops_the_others(stand_in: Path) -> None:
    folder = make_sweep(stand_in / "s", "seed=7,13,1")
    assert Driver(folder, text_console(), parallel=2, fail_fast=True).run() == 3
    assert states(folder) == ["interrupted", "failed", "pending"]
    assert starts(folder)[2] == 0


def test_a_signal_saves_the_jobs_and_a_restart_goes_on(stand_in: Path) -> None:
    folder = make_sweep(stand_in / "s", "seed=1,7,2")
    driver = Listening(folder, text_console())

    def hear(text: str) -> None:
        run = folder / driver.jobs[1].run_dir
        if "[2/3]" in text and "started" in text:
            while not (run / "starts").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

    driver.hear = hear
    assert driver.run() == EXIT_INTERRUPTED
    assert states(folder) == ["finished", "interrupted", "pending"]
    (folder / "go").touch()
    assert Driver(folder, text_console()).run() == 0
    assert starts(folder) == [1, 2, 1]


def test_a_killed_driver_loses_nothing(stand_in: Path) -> None:
    """SIGKILL at the driver: the job at work goes on, and the restart follows it to its end."""
    folder = make_sweep(stand_in / "s", "seed=1,7,2")
    script = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from vlx.commands import sweep\n"
        "sweep.job_command = lambda run: [sys.executable, '-c', sys.argv[2], str(run)]\n"
        "sweep.Driver(Path(sys.argv[1]), Console()).run()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(folder), STAND_IN], stdout=subprocess.DEVNULL
    )
    while standing(folder, read_jobs(folder)[1]) != "running":
        assert driver.poll() is None
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert states(folder)[::2] == ["finished", "pending"]
    again = Listening(folder, text_console())
    again.hear = lambda text: (folder / "go").touch() if "already at work" in text else None
    assert again.run() == 0
    assert states(folder) == ["finished"] * 3
    assert starts(folder) == [1, 1, 1]


def test_a_job_killed_with_its_driver_is_run_again(stand_in: Path) -> None:
    folder = make_sweep(stand_in / "s", "seed=1,7")
    driver = Listening(folder, text_console())

    def hear(text: str) -> None:
        if "[2/2]" in text and "started" in text:
            driver.stop_signal = signal.SIGKILL

    driver.hear = hear
    assert driver.run() == 128 + signal.SIGKILL
    assert states(folder)[1] in ("killed", "failed")
    (folder / "go").touch()
    assert Driver(folder, text_console()).run() == 0
    assert states(folder) == ["finished"] * 2


def test_a_job_is_known_to_be_at_work_before_it_can_say_so(stand_in: Path) -> None:
    """A driver killed while its job still imports torch: the restart waits for that job."""
    folder = make_sweep(stand_in / "s", "seed=1,2")
    job = read_jobs(folder)[0]
    driver = Driver(folder, text_console())
    sleeper = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    run_dir = prepare(job.config, job.overrides, sweep="s", run_dir=folder / job.run_dir)
    with at_work(run_dir) as lock:
        process = subprocess.Popen(sleeper, stdin=subprocess.PIPE, pass_fds=(lock,))
    with process:
        assert standing(folder, job) == "running"
        with pytest.raises(VlxError, match="in use"):
            driver._launch(job)
        process.kill()
    assert standing(folder, job) == "created"


def test_a_driver_killed_while_making_a_run_directory_loses_nothing(stand_in: Path) -> None:
    folder = make_sweep(stand_in / "s", "seed=1,2")
    (folder / read_jobs(folder)[0].run_dir).mkdir()
    assert Driver(folder, text_console()).run() == 0
    assert states(folder) == ["finished"] * 2


def test_files_edited_after_the_start_change_nothing(stand_in: Path) -> None:
    preset = stand_in / "mine.yaml"
    preset.write_text("defaults:\n  - override /encoder: digits\nmethod:\n  mask_ratio: 0.5\n")
    cells = expand(method_root("mae", "pretrain-mim", str(preset)), ["seed=1,2"])
    folder = stand_in / "s"
    folder.mkdir()
    write_jobs(folder, [freeze(number, cell, folder) for number, cell in enumerate(cells)])
    preset.write_text("method:\n  no_such_key: 1\n")
    assert Driver(folder, text_console()).run() == 0
    for job in read_jobs(folder):
        config = yaml.safe_load((folder / job.run_dir / "config.yaml").read_text())
        assert config["method"]["mask_ratio"] == 0.5


def test_a_mistake_in_any_job_is_told_before_anything_starts(stand_in: Path) -> None:
    for overrides in (["seed=1,2,x"], ["seed=1,2", "encoder=digits,nothing"], ["sed=1,2"]):
        with pytest.raises(VlxError):
            start(smoke_line(*overrides, multirun=True), text_console())
    assert not Path("runs").exists()


def test_a_name_that_is_taken_names_the_way_on(stand_in: Path) -> None:
    line = smoke_line("seed=1,2", "name=s", multirun=True)
    assert start(line, text_console()) == 0
    with pytest.raises(VlxError, match="vlx sweep runs/sweeps/s"):
        start(line, text_console())


def test_a_dry_run_of_a_sweep_lists_its_jobs(here: Path) -> None:
    console = text_console()
    assert start(smoke_line("seed=1,2", multirun=True, dry_run=True), console) == 0
    assert "000-seed_1" in text_of(console)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "3\n", '{"id": "a"}\n', ""])
def test_foreign_job_lists_are_named(here: Path, content: str) -> None:
    (here / "sweep.jsonl").write_text(content)
    if content:
        with pytest.raises(VlxError, match=r"sweep\.jsonl is not a sweep"):
            read_jobs(here)
    else:
        assert read_jobs(here) == []


def test_exit_codes_and_spreads() -> None:
    assert worst([0, 0]) == 0
    assert worst([0, 75]) == 75
    assert worst([75, 2, 0, 3]) == 3
    assert worst([-9, 0]) == 137
    assert worst([]) == 0
    assert str(spread([0.5])) == "0.5000 (1)"
    assert spread([1.0, 3.0]).std == pytest.approx(2**0.5)


@pytest.mark.slow
def test_real_jobs_survive_a_killed_driver(cli, tmp_path: Path) -> None:
    words = ["track=none", "train.steps=2", "eval.at_end=[knn]", "eval.compare_untrained=false"]
    line = ["pretrain", "mae", "seed=0,1", "--preset", "smoke", "-m", *words, "name=s"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "vlx", *line], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    folder = tmp_path / "runs" / "sweeps" / "s"
    while not (folder / "000-seed_0" / "run.json").exists():
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    done = cli("sweep", "runs/sweeps/s")
    assert states(folder) == ["finished"] * 2
    assert "(2)" in done.stdout
    summary = json.loads((folder / "sweep.json").read_text())
    assert summary["over_seeds"][0]["seeds"] == [0, 1]
