"""A checkpoint's files against its manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlx.core.errors import CheckpointError
from vlx.core.files import parse_json
from vlx.core.manifest import MANIFEST_FILE, WEIGHTS, check, fault, manifest_text, newest


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (folder / name).write_text(f"the bytes of {name}")
    (folder / MANIFEST_FILE).write_text(manifest_text(folder))
    return folder


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    change(manifest)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def test_a_whole_checkpoint_has_no_fault(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step-00000001")
    assert fault(folder) is None
    (folder / ".DS_Store").touch()
    check(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", ".", "a\0b"])
def test_a_manifest_names_files_of_its_checkpoint_alone(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step-00000001")
    (tmp_path / "secret").touch()
    rewrite(folder, lambda manifest: manifest.update({name: {"bytes": 0, "sha256": ""}}))
    assert "which is no file of the checkpoint" in str(fault(folder))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "names no model.safetensors and state.json"),
        ("[]", "names no model.safetensors and state.json"),
        ('{"model', "cannot be read"),
        ('{"model.safetensors": 1, "state.json": 2, "optimizer.safetensors": 3}', "cannot be"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_manifest_that_is_none(text: str, reason: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step-00000001")
    (folder / MANIFEST_FILE).write_text(text)
    assert reason in str(fault(folder))


def test_weights_that_no_manifest_names_are_not_read(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step-00000001")
    (folder / "ema.safetensors").touch()
    assert fault(folder) == "manifest.json does not name ema.safetensors"


def test_a_model_needs_no_optimizer(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step-00000001")
    (folder / "optimizer.safetensors").write_text("the bytes of optimizer.safetensorz")
    assert fault(folder, digests=False) is None
    assert fault(folder) == "optimizer.safetensors is not what was saved"
    assert fault(folder, only=WEIGHTS) is None
    (folder / "optimizer.safetensors").unlink()
    assert fault(folder) == "no optimizer.safetensors"
    assert newest(tmp_path, only=WEIGHTS) == folder
    with pytest.raises(CheckpointError, match=r"can be read \(step-00000001: no optimizer"):
        newest(tmp_path)


def test_json_without_end_is_a_value_error() -> None:
    assert parse_json('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)
