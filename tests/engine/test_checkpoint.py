"""FIELD-NOTES section 4, tests 3 and 4: faults while writing and reading checkpoints."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.data.make import encode, picture
from tests.engine.inprocess import interrupt, run_here, stop_after
from tests.engine.processes import execute, finish, make_run, start
from vlx.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    StorageError,
    VlxError,
)
from vlx.core.results import read_results
from vlx.encoders.checkpoint import read_weights
from vlx.engine import checkpoint
from vlx.engine.checkpoint import Snapshot
from vlx.engine.rundir import check_same_config, make_run_dir, read_record
from vlx.track.jsonl import JsonlTrack, read_metrics

QUICK = ("train.steps=4", "train.checkpoint_every=2", "eval.at_end=[]", "data.workers=0")


def snapshot(step: int, fill: float = 1.0) -> Snapshot:
    big = torch.full((64, 1024), fill)  # 256 KiB
    return Snapshot(step, {"w": big}, {"w/exp_avg": big}, {}, {"step": step})


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow past `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB; skips where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Writing


def test_full_disk_keeps_the_last_good_checkpoint(small_disk: Path) -> None:
    checkpoint.save(small_disk, snapshot(1))
    with pytest.raises(CheckpointError, match="no space left on device") as caught:
        checkpoint.save(small_disk, snapshot(2))
    assert "\n" not in str(caught.value)
    assert "vlx resume" in str(caught.value)
    assert names(small_disk) == ["step-00000001"]
    found = checkpoint.latest(small_disk)
    assert found is not None
    assert checkpoint.load(found).step == 1


def test_refused_write_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(1))
    with file_size_limit(100_000), pytest.raises(CheckpointError, match="file too large"):
        checkpoint.save(tmp_path, snapshot(2))
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("call", range(6))
def test_failing_sync_or_write_leaves_nothing_half_done(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, snapshot(1))
    calls = 0
    original = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoint.save(tmp_path, snapshot(2))
    monkeypatch.undo()
    assert [n for n in names(tmp_path) if n.startswith(".tmp-")] == []
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert checkpoint.is_complete(found, digests=True)


def test_file_in_place_of_the_directory_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoints/step-00000001"):
        checkpoint.save(tmp_path / "checkpoints", snapshot(1))


def test_saving_a_step_again_never_leaves_it_without_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, snapshot(1, fill=1.0))
    seen: list[list[str]] = []
    original = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append(names(tmp_path)), original(a, b)))
    checkpoint.save(tmp_path, snapshot(1, fill=2.0))
    assert all(len(entries) == 2 for entries in seen)  # the old one and the new one, whole
    assert checkpoint.load(tmp_path / "step-00000001").model["w"][0, 0] == 2.0
    assert names(tmp_path) == ["step-00000001"]


def test_prune_keeps_the_newest_and_the_best_and_sweeps(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, snapshot(step))
    (tmp_path / ".tmp-step-00000006-1").mkdir()
    checkpoint.prune(tmp_path, keep_last=2, best="step-00000001")
    assert names(tmp_path) == ["step-00000001", "step-00000004", "step-00000005"]


def test_prune_does_not_count_a_broken_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step))
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    checkpoint.prune(tmp_path, keep_last=1)
    assert names(tmp_path) == ["step-00000001"]


# Reading


def damage_truncate(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def damage_flip(path: Path) -> None:
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def damage_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def damage_half_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"model.safetensors": {"byt')


def damage_missing_file(path: Path) -> None:
    (path / "state.json").unlink()


DAMAGES = [
    damage_truncate,
    damage_flip,
    damage_manifest,
    damage_half_manifest,
    damage_missing_file,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step))
    damage(tmp_path / "step-00000002")
    found = checkpoint.latest(tmp_path)
    assert found == tmp_path / "step-00000001"
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path / 'step-00000002'} is damaged and passed over: " in line
    with pytest.raises(CheckpointError, match="incomplete or damaged"):
        checkpoint.load(tmp_path / "step-00000002")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_where_all_are_damaged_nothing_begins_again_at_step_0(damage, tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None  # no checkpoint yet: a run that begins
    for step in (1, 2):
        damage(checkpoint.save(tmp_path, snapshot(step)))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read \(step-00000002: "):
        checkpoint.latest(tmp_path)


def test_foreign_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = checkpoint.save(tmp_path, snapshot(1))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format other than 1 and 2"):
        checkpoint.load(path)


def test_keys_that_do_not_fit_are_listed() -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}
    saved = {"a": torch.zeros(3), "b": torch.zeros(2), "d": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"1 missing \(c\); 1 unexpected \(d\); 1 reshaped"):
        checkpoint.check_keys(own, saved)


# Runs


def test_run_with_a_damaged_newest_checkpoint_goes_on_from_the_one_before(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run", *QUICK, "train.steps=6")
    interrupt(run_dir, 4)
    damage_flip(run_dir / "checkpoints" / "step-00000004")
    (run_dir / "checkpoints" / ".tmp-step-00000006-123").mkdir()
    assert run_here(run_dir)[0] == 0
    assert "resumed at step 2 of 6" in (run_dir / "log.txt").read_text()
    assert names(run_dir / "checkpoints") == ["step-00000004", "step-00000006"]


def test_a_run_whose_data_has_changed_is_not_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train" / "ant"
    folder.mkdir(parents=True)
    for number in range(64):
        (folder / f"{number:02d}.bmp").write_bytes(encode(picture(number, 8), "BMP"))
    data = ("data.source=folder", f"data.path={tmp_path / 'data'}", "train.batch_size=32")
    run_dir = make_run(tmp_path, "run", *QUICK, *data)
    interrupt(run_dir, 2)
    before = json.loads((run_dir / "data.json").read_text())["fingerprint"]
    original = (folder / "07.bmp").read_bytes()
    (folder / "07.bmp").write_bytes(encode(picture(99, 8), "BMP"))
    with pytest.raises(DataError, match=rf"the data has changed: .*train/train .*{before}.* finds"):
        run_here(run_dir)
    (folder / "07.bmp").write_bytes(original)
    assert run_here(run_dir)[0] == 0
    assert read_results(run_dir).data_fingerprint == before


def _limit_files_to_200_kb() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.slow
def test_run_on_a_full_disk_fails_in_one_line_and_resumes(tmp_path: Path) -> None:
    """The weights of the smoke model take 256 kB: the limit refuses them, but not run.json."""
    run_dir = make_run(tmp_path, "run", *QUICK)
    finish(start(run_dir, before=_limit_files_to_200_kb), run_dir, code=2)
    lines = [x for x in (run_dir / "child.txt").read_text().splitlines() if "error" in x]
    assert len(lines) == 1
    assert "file too large" in lines[0]
    assert read_record(run_dir).state == "failed"
    assert names(run_dir / "checkpoints") == []
    execute(run_dir)
    assert read_record(run_dir).state == "finished"


def _full(*names: str):
    """A stand-in for os.open and open that finds the disk full for some files."""
    original = os.write

    def write(descriptor: int, data: bytes) -> int:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(names):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data)

    return write


def test_full_disk_for_metrics_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path, "run", *QUICK)
    monkeypatch.setattr(os, "write", _full("metrics.jsonl"))
    with pytest.raises(StorageError, match=r"cannot write .*metrics.jsonl: no space left"):
        run_here(run_dir)
    assert read_record(run_dir).state == "failed"


def test_full_disk_for_results_is_one_line_and_resume_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path, "run", *QUICK)
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == "results.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(StorageError, match=r"cannot write .*results.json: no space left"):
            run_here(run_dir)
    assert not (run_dir / "results.json").exists()
    assert not list(run_dir.glob(".*.tmp"))
    assert run_here(run_dir)[0] == 0
    assert read_results(run_dir).steps == 4


def test_disk_that_takes_nothing_at_all_shows_the_first_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json cannot say that the run failed either; the reason shown is the first."""
    run_dir = make_run(tmp_path, "run", *QUICK)
    original, full = os.replace, False

    def replace(source: Path, target: Path) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    def save(*_: object) -> None:
        nonlocal full
        full = True
        raise CheckpointError("cannot write the checkpoint: no space left on device")

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        run_here(run_dir)


def test_run_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot make .*runs/x: Not a directory\. Set runs_dir"):
        make_run_dir(str(tmp_path / "runs"), "x", "mae", 0)


def test_directory_that_vanished_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(VlxError, match="cannot be read"):
        run_here(tmp_path / "gone")


# What is written


def test_everything_written_loads_without_running_code(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run", *QUICK, "train.ema_decay=0.9")
    run_here(run_dir)
    tensors = sorted(run_dir.rglob("*.safetensors"))
    assert {t.name for t in tensors} == {
        "model.safetensors",
        "optimizer.safetensors",
        "ema.safetensors",
    }
    for file in tensors:
        assert load_file(file)
    for file in run_dir.rglob("*.json"):
        json.loads(file.read_text())
    binary = {".pt", ".pth", ".pkl", ".bin", ".npy"}
    assert not [f for f in run_dir.rglob("*") if f.suffix in binary]


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/vlx-was-here",)


def test_malicious_pickle_is_refused(tmp_path: Path) -> None:
    beside = {"model": {"weight": torch.ones(2), "more": _Evil()}}
    for name, value in {"a.pth": {"model": _Evil()}, "b.pth": _Evil(), "c.pth": beside}.items():
        with (tmp_path / name).open("wb") as stream:
            pickle.dump(value, stream)
        torch.save(value, tmp_path / f"zip-{name}")
        for file in (tmp_path / name, tmp_path / f"zip-{name}"):
            with pytest.raises(CheckpointError, match="cannot read"):
                read_weights(file)
    assert not Path("/tmp/vlx-was-here").exists()


# Changed configurations


def test_changed_configuration_is_refused_with_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    run_dir = make_run(tmp_path, "run", *QUICK)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run_here(run_dir)
    file = run_dir / "config.yaml"
    values = yaml.safe_load(file.read_text())
    values["optim"]["lr"] = 0.5
    values["method"]["mask_ratio"] = 0.5
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"method.mask_ratio: 0.75 -> 0.5; optim.lr: 0.001 -> 0"):
        run_here(run_dir)
    values["optim"]["lr"], values["method"]["mask_ratio"] = 0.001, 0.75
    values["train"]["log_every"] = 2
    values["data"]["workers"] = 1
    file.write_text(yaml.safe_dump(values))
    assert run_here(run_dir)[0] == 0


@pytest.mark.parametrize(
    "key", ["data.workers", "launcher.processes", "track.mode", "train.log_every", "runs_dir"]
)
def test_harmless_keys_may_change(key: str) -> None:
    section, _, name = key.partition(".")
    check_same_config({section: {name: 1} if name else 1}, {section: {name: 2} if name else 2})


@pytest.mark.parametrize("key", ["seed", "train.precision", "encoder.dim", "data.path"])
def test_keys_that_change_numbers_may_not(key: str) -> None:
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=rf"{key}: 1 -> 2"):
        check_same_config({section: {name: 1} if name else 1}, {section: {name: 2} if name else 2})


# metrics.jsonl


def test_metrics_past_the_resumed_step_and_torn_lines_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "x": step}) for step in range(1, 5)]
    file.write_text("\n".join(lines) + '\n{"step": 5, "x')
    assert [r["step"] for r in read_metrics(file)] == [1, 2, 3, 4]
    track = JsonlTrack(file, resume_step=2)
    track.log(3, {"x": 30.0})
    track.close(0)
    assert [(r["step"], r["x"]) for r in read_metrics(file)] == [(1, 1), (2, 2), (3, 30)]


def test_metrics_with_a_damaged_line_are_still_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n\x00\x00\x00\xff\n[1]\n{"step": 2}\n')
    assert [r["step"] for r in read_metrics(file)] == [1, 2]
