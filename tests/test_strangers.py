"""What strangers hand over (run directories, presets, names) is read, and never acts."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.conftest import Cli

_SHORT = ("track=none", "train.batch_size=4", "train.steps=1", "eval.at_end=[knn]")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A program that leaves the file `ran` and writes a shard."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(8):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), (number * 30, 0, 0)).save(picture, "PNG")
            for name, data in (("png", picture.getvalue()), ("cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    script = tmp_path / "make"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\ncat {tmp_path}/x.tar\n")
    script.chmod(0o755)
    return f"pipe:{script}"


def test_a_command_runs_where_it_is_typed_alone(cli: Cli, command: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = f'data.path="{command}"'
    line = ("pretrain", "mae", "data=webdataset", *_SHORT)
    cli(*line, path, "--dry-run")
    cli(*line, path, "--cfg", "job")
    preset = tmp_path / "stranger.yaml"
    preset.write_text(yaml.safe_dump({"data": {"source": "webdataset", "path": command}}))
    done = cli("pretrain", "mae", "--preset", str(preset), *_SHORT, check=False)
    assert done.returncode == 2
    assert "is run only where it is typed" in done.stderr
    assert not (tmp_path / "runs").exists()
    assert not ran.exists()

    cli(*line, path, "name=mine")
    assert ran.exists()
    ran.unlink()
    cli("eval", "knn", "encoder.checkpoint=runs/mine", "name=again")  # its output was kept
    (tmp_path / "cache").rename(tmp_path / "gone")
    for words in (
        ("eval", "knn", "encoder.checkpoint=runs/mine"),
        ("rerun", "runs/mine"),
        ("data", "preview", "mae", "--preset", str(preset)),
    ):
        done = cli(*words, check=False)
        assert done.returncode == 2, words
        assert "is run only where it is typed" in done.stderr
    assert not ran.exists()
