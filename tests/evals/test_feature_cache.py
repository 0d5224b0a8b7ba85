"""Features on disk: read where all that they come from is the same, and never half."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.make import config, shard
from tests.evals.twin import Pairs, Twin, eval_data
from vlx.core.capability import ImageFeatures
from vlx.data.cache import cache_dir
from vlx.evals.base import EvalData, Subject
from vlx.evals.config import EvalConfig
from vlx.evals.feature_cache import FeatureCache, Tensors
from vlx.evals.registry import evaluator

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_dir() / "features"


class Build:
    """Three rows, counted."""

    calls = 0

    def __call__(self) -> Tensors:
        self.calls += 1
        return {"features": torch.full((3, 2), float(self.calls)), "labels": torch.arange(3)}


def test_what_was_built_is_read_by_the_next(caplog: pytest.LogCaptureFixture) -> None:
    build = Build()
    with caplog.at_level(logging.INFO, "vlx"):
        first = FeatureCache("a").once("image", ("x",), build, rows=3, device=CPU)
        again = FeatureCache("a").once("image", ("x",), build, rows=3, device=CPU)
    assert build.calls == 1
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len([r for r in caplog.records if "features read from" in r.message]) == 1


@pytest.mark.parametrize(
    ("identity", "what", "parts"), [("b", "image", "x"), ("a", "joint", "x"), ("a", "image", "y")]
)
def test_another_model_or_other_data_is_built(identity: str, what: str, parts: str) -> None:
    build = Build()
    FeatureCache("a").once("image", ("x",), build, rows=3, device=CPU)
    FeatureCache(identity).once(what, (parts,), build, rows=3, device=CPU)
    assert build.calls == 2


@pytest.mark.parametrize("rows", [4, None])
def test_features_of_damaged_or_unknown_data_are_not_kept(
    rows: int | None, own_cache: Path
) -> None:
    build = Build()
    for _ in range(2):
        FeatureCache("a").once("image", ("x",), build, rows=rows, device=CPU)
    assert build.calls == 2
    assert not own_cache.exists()


def test_a_damaged_file_is_written_anew(own_cache: Path) -> None:
    build = Build()
    FeatureCache("a").once("image", (), build, rows=3, device=CPU)
    (file,) = own_cache.iterdir()
    file.write_bytes(b"half")
    FeatureCache("a").once("image", (), build, rows=3, device=CPU)
    FeatureCache("a").once("image", (), build, rows=3, device=CPU)
    assert build.calls == 2
    assert list(own_cache.iterdir()) == [file]


def test_a_place_that_cannot_be_written_is_no_error(
    own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("a file")
    found = FeatureCache("a").once("image", (), Build(), rows=3, device=CPU)
    assert found["features"].shape == (3, 2)
    assert "cannot keep features in" in caplog.text


def test_evaluators_share_files_and_other_texts_have_their_own(own_cache: Path) -> None:
    source = Pairs(20)

    def run(name: str, **keys) -> tuple[int, int]:
        twin = Twin(source)
        subject = Subject("twin", (twin,))
        subject.cache = FeatureCache("twin")
        evaluator(name).run(subject, eval_data(source, **keys))
        return twin.num_images, twin.num_texts

    captions = len({text for texts in source.texts for text in texts})
    assert run("zero-shot") == (20, 7 * 7)
    assert run("retrieval") == (0, captions)
    assert run("zero-shot", template_list=["a {}"]) == (0, 7)
    assert run("zero-shot") == run("retrieval") == (0, 0)
    source.texts[0] = ["another caption"]
    assert run("retrieval")[0] == 0
    assert run("retrieval") == (0, 0)
    kinds = sorted(file.name.split("-")[0] for file in own_cache.iterdir())
    assert kinds == ["classes", "classes", "joint", "texts", "texts"]


class Means(ImageFeatures):
    """Mean colours, and how often they were asked for."""

    calls = 0

    def image_features(self, images: Tensor) -> Tensor:
        self.calls += 1
        return images.mean((2, 3))

    def patch_features(self, images: Tensor) -> Tensor:
        raise NotImplementedError


def test_features_are_of_what_the_data_holds_not_of_its_name_size_and_time(tmp_path: Path) -> None:
    def features(folder: Path) -> tuple[Tensor, Tensor, int]:
        means = Means()
        subject = Subject("means", (means,))
        subject.cache = FeatureCache("means")
        data = EvalData(
            config(source="webdataset", path=str(folder)), EvalConfig(), image_size=20, device=CPU
        )
        found = data.features(subject, "test")
        return found.features, found.labels, means.calls

    file = shard(tmp_path / "data" / "test-0.tar", range(6))
    first, before = features(file.parent), file.stat()
    assert first[2] == 1
    assert features(file.parent)[2] == 0
    shutil.copytree(file.parent, tmp_path / "moved")
    assert features(tmp_path / "moved")[2] == 0
    shard(file, range(7, 13))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again = features(file.parent)
    assert again[2] == 1
    assert not torch.equal(again[0], first[0])
    assert again[1].tolist() == [number % 3 for number in range(7, 13)]
