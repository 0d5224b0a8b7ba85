"""Files of torch give their tensors and run nothing."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlx.core.errors import CheckpointError
from vlx.encoders.checkpoint import read_weights


class Tower(nn.Module):
    """Names like those of OpenAI's CLIP: half precision, a buffer, a shared view."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4))
        self.positional_embedding = nn.Parameter(torch.randn(5, 6).half())
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x).mean() * self.logit_scale + self.positional_embedding.float().mean()


@pytest.mark.parametrize("how", ["trace", "script"])
def test_a_torchscript_archive_gives_its_state(tmp_path: Path, how: str, monkeypatch) -> None:
    model = Tower().eval()
    make = (
        torch.jit.script
        if how == "script"
        else lambda m: torch.jit.trace(m, torch.rand(1, 3, 4, 4))
    )
    torch.jit.save(make(model), tmp_path / "clip.pt")
    monkeypatch.setattr(torch.jit, "load", None)
    found = read_weights(tmp_path / "clip.pt")
    wanted = model.state_dict()
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_a_state_beside_arguments_and_numpy_scalars_is_read(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4).T  # not contiguous
    content = {
        "model": {"weight": weight, "half": weight.half(), "count": torch.tensor(3)},
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.5),
    }
    torch.save(content, tmp_path / "weights.pth")
    found = read_weights(tmp_path / "weights.pth")
    for name, value in content["model"].items():
        assert torch.equal(found[name], value)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_nothing_that_a_file_names_is_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"weight": torch.ones(2)}, "x": Evil()}, "new.pth")
    assert torch.equal(read_weights("new.pth")["weight"], torch.ones(2))
    torch.save(
        {"model": {"weight": torch.ones(2)}, "x": Evil()},
        "old.pth",
        _use_new_zipfile_serialization=False,
    )
    with pytest.raises(CheckpointError, match=r"holds posix\.mkdir beside tensors") as caught:
        read_weights("old.pth")
    assert not Path("ran").exists()
    for text in ("\n", "\x1b", "weights_only"):
        assert text not in str(caught.value)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_other_files_are_one_line(tmp_path: Path, protocol: int) -> None:
    file = tmp_path / "weights.pth"
    for content in (b"", b"\x1b[1mnoise\n\n", pickle.dumps({"a": 1}, protocol)):
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_weights(file)
        assert not {"\n", "\x1b"} & set(str(caught.value))
        assert "weights_only" not in str(caught.value)


def test_an_archive_that_is_cut_short_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"weight": torch.rand(1000)}, file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="cannot read"):
        read_weights(file)
