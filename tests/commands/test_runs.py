"""Past runs: listed, resumed with harmless changes, repeated from their frozen configuration."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands.conftest import text_console, text_of
from vlx.commands.runs import change_config, find_runs, list_runs, rerun, resume
from vlx.core.errors import ConfigError, VlxError
from vlx.core.results import read_results
from vlx.engine.run import execute
from vlx.engine.rundir import read_record


@pytest.fixture
def runs(here: Path, smoke_run: Path) -> Path:
    """A runs/ with one finished run."""
    shutil.copytree(smoke_run, here / "runs" / "first")
    config = here / "runs" / "first" / "config.yaml"
    config.write_text(config.read_text().replace(f"runs_dir: {smoke_run.parent}", "runs_dir: runs"))
    return here / "runs"


def set_state(run: Path, state: str, **values: object) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"state": state} | values))


def test_runs_shows_state_steps_and_headline(runs: Path) -> None:
    console, errors = text_console(), text_console()
    list_runs(runs, as_json=False, console=console, errors=errors)
    shown = text_of(console)
    for word in ("first", "mae smoke", "finished", "2/2", "knn/top1"):
        assert word in shown
    assert text_of(errors) == ""


def test_runs_of_sweeps_are_found_and_json_is_complete(runs: Path, capsys) -> None:
    shutil.copytree(runs / "first", runs / "sweeps" / "s" / "000-seed_0")
    list_runs(runs, as_json=True, console=text_console(), errors=text_console())
    rows = json.loads(capsys.readouterr().out)
    places = sorted(str(Path(row["directory"]).relative_to(runs)) for row in rows)
    assert places == ["first", "sweeps/s/000-seed_0"]
    assert rows[0]["value"] == read_results(runs / "first").value("knn/top1")
    assert {row["state"] for row in rows} == {"finished"}


def test_foreign_and_half_written_files_are_named_and_skipped(runs: Path) -> None:
    for name, file, content in [
        ("half", "results.json", (runs / "first" / "results.json").read_text()[:100]),
        ("foreign", "results.json", '{"accuracy": 1}'),
        ("strange", "run.json", '{"id": 3}'),
        ("empty", "run.json", ""),
    ]:
        shutil.copytree(runs / "first", runs / name)
        (runs / name / file).write_text(content)
    (runs / "orphan").mkdir()
    (runs / "orphan" / "results.json").write_text("{}")
    (runs / "other").mkdir()
    found, problems = find_runs(runs)
    assert [row.id for row in found] == ["smoke"]
    assert len(problems) == 5
    for name in ("half", "foreign", "strange", "empty", "orphan"):
        assert any(f"{runs / name}" in problem for problem in problems), name


def test_a_run_whose_process_died_is_shown_as_killed(runs: Path) -> None:
    (runs / "first" / "results.json").unlink()
    set_state(runs / "first", "running")
    assert find_runs(runs)[0][0].state == "killed"
    hold = (
        "import pathlib, sys; from vlx.engine.rundir import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(runs / "first")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert find_runs(runs)[0][0].state == "running"
        holder.kill()
        holder.wait()
    assert find_runs(runs)[0][0].state == "killed"


def test_rerun_repeats_a_run_to_the_bit(runs: Path) -> None:
    console = text_console()
    assert rerun(runs / "first", "again", console) == 0
    first, again = read_results(runs / "first"), read_results(runs / "again")
    assert again.weights_checksum == first.weights_checksum
    assert again.metrics == first.metrics
    assert again.config_hash == first.config_hash
    assert read_record(runs / "again").overrides == read_record(runs / "first").overrides
    with pytest.raises(VlxError, match="exists"):
        rerun(runs / "first", "again", console)
    with pytest.raises(VlxError, match="without '/'"):
        rerun(runs / "first", "a/b", console)


def test_resume_of_a_finished_run_shows_its_results(runs: Path) -> None:
    console = text_console()
    assert resume(runs / "first", [], console) == 0
    assert "nothing to resume" in text_of(console)
    assert "knn/top1" in text_of(console)


def test_resume_writes_harmless_changes_and_goes_on(runs: Path) -> None:
    run = runs / "first"
    before = read_results(run)
    (run / "results.json").unlink()
    set_state(run, "interrupted")
    assert resume(run, ["train.log_every=5", "data.workers=0"], text_console()) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["train"]["log_every"], config["data"]["workers"]) == (5, 0)
    assert read_results(run).weights_checksum == before.weights_checksum


def test_a_refused_change_leaves_the_config_as_it_was(runs: Path) -> None:
    before = (runs / "first" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="has begun"):
        change_config(runs / "first", ["train.log_every=5", "seed=3"])
    assert (runs / "first" / "config.yaml").read_bytes() == before


def test_a_run_whose_config_was_edited_is_refused_with_the_difference(runs: Path) -> None:
    """Reliability 5."""
    run = runs / "first"
    set_state(run, "interrupted")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["optim"]["lr"] = 0.5
    config["train"]["log_every"] = 9  # harmless: not in the difference
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.001 -> 0\.5\)") as refusal:
        execute(run)
    assert "log_every" not in str(refusal.value)
    assert read_record(run).state == "failed"


def test_directories_that_are_no_runs(here: Path) -> None:
    (here / "x").mkdir()
    with pytest.raises(VlxError, match="not a run directory"):
        resume(here / "x", [], text_console())
    with pytest.raises(VlxError, match="not a run directory"):
        rerun(here / "x", None, text_console())
    with pytest.raises(VlxError, match="no directory"):
        find_runs(here / "nothing")
