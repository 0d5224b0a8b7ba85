"""A run directory on a dying disk: every command that reads weights compares them first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.commands.conftest import smoke_line, text_console
from vlx.commands.export import export
from vlx.commands.runs import find_runs, resume
from vlx.commands.start import Line, start
from vlx.commands.sweep_file import SWEEP_FILE, read_jobs
from vlx.core.errors import CheckpointError, VlxError
from vlx.core.results import read_results
from vlx.engine.rundir import RunRecord, read_record


def flip(checkpoint: Path, name: str = "model.safetensors") -> None:
    """Change one bit of the last tensor."""
    data = bytearray((checkpoint / name).read_bytes())
    data[-1] ^= 1
    (checkpoint / name).write_bytes(data)


@pytest.fixture
def run(smoke_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(smoke_run, tmp_path / "runs" / "smoke")
    return tmp_path / "runs" / "smoke"


def interrupted(run: Path) -> None:
    record = read_record(run)
    RunRecord(**{**vars(record), "state": "interrupted"}).write(run)
    (run / "results.json").unlink()


def test_eval_export_and_a_new_run_refuse_a_flipped_bit(run: Path, tmp_path: Path) -> None:
    for checkpoint in run.glob("checkpoints/step-*"):
        flip(checkpoint)
    words = [f"encoder.checkpoint={run}", f"runs_dir={tmp_path / 'runs'}"]
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was saved"):
        start(Line(command="eval", name="knn", overrides=words), text_console())
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was saved"):
        start(smoke_line(*words), text_console())
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was saved"):
        export(run, tmp_path / "out", "timm", text_console())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_resume_does_not_begin_again_where_all_are_damaged(name: str, run: Path) -> None:
    interrupted(run)
    for checkpoint in run.glob("checkpoints/step-*"):
        flip(checkpoint, name)
    before = sorted(run.glob("checkpoints/**/*"))
    with pytest.raises(CheckpointError, match=f"no checkpoint in .*{name} is not what was saved"):
        resume(run, [], text_console())
    assert sorted(run.glob("checkpoints/**/*")) == before
    assert read_record(run).state == "failed"
    shutil.rmtree(run / "checkpoints")
    assert resume(run, [], text_console()) == 0


def test_deeply_nested_files_are_a_line(run: Path) -> None:
    for file, read in (("run.json", read_record), ("results.json", read_results)):
        (run / file).write_text("[" * 100_000)
        with pytest.raises(VlxError, match="nested too deeply"):
            read(run)
    rows, problems = find_runs(run.parent)
    assert not rows
    assert len(problems) == 1
    (run / SWEEP_FILE).write_text("[" * 100_000)
    with pytest.raises(VlxError, match="nested too deeply"):
        read_jobs(run)
