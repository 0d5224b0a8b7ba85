"""`vlx eval`: a plain encoder from a run or a file, on any labelled source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands.conftest import CHEAP, text_console, text_of
from vlx.commands.start import Line, start
from vlx.core.errors import CheckpointError, DataError, VlxError
from vlx.core.results import Results, read_results
from vlx.data.config import DataConfig
from vlx.data.sources.digits import Digits
from vlx.encoders.checkpoint import read_weights
from vlx.engine.rundir import read_record


def evaluate(name: str, *overrides: str, **words: bool) -> tuple[Results, str]:
    console = text_console()
    line = Line(command="eval", name=name, overrides=[*overrides, "name=evaluated"], **words)
    assert start(line, console) == 0
    return read_results(Path("runs/evaluated")), text_of(console)


def test_an_evaluation_of_a_run_gives_the_runs_own_number(here: Path, smoke_run: Path) -> None:
    results, shown = evaluate("knn", f"encoder.checkpoint={smoke_run}")
    assert results.value("knn/top1") == read_results(smoke_run).value("knn/top1")
    assert (results.command, results.method, results.steps) == ("eval", "knn", 0)
    assert results.data_fingerprint == Digits(DataConfig(), "test").info.fingerprint
    assert results.weights_checksum
    assert read_record(Path("runs/evaluated")).state == "finished"
    assert "knn/top1" in shown


def test_a_file_of_encoder_weights_gives_the_same(here: Path, smoke_run: Path) -> None:
    state = read_weights(smoke_run)
    prefix = "encoder.vit."
    encoder = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    save_file(encoder, here / "encoder.safetensors")
    size = ("encoder=digits", "encoder.dim=48", "encoder.depth=2")
    results, _ = evaluate("knn", "encoder.checkpoint=encoder.safetensors", *size)
    assert results.value("knn/top1") == read_results(smoke_run).value("knn/top1")


@pytest.mark.slow
def test_an_encoder_is_built_as_its_method_had_built_it(here: Path) -> None:
    """STViT's layers are the method's keys, and no weight shows them."""
    overrides = [*CHEAP, "name=trained"]
    line = Line(command="prune-tokens", name="stvit", preset="smoke", overrides=overrides)
    assert start(line, text_console()) == 0
    results, _ = evaluate("knn", "encoder.checkpoint=runs/trained")
    assert results.value("knn/top1") == read_results(Path("runs/trained")).value("knn/top1")


def test_the_reconstruction_of_a_run_is_drawn(here: Path, smoke_run: Path) -> None:
    results, _ = evaluate("reconstruction", f"encoder.checkpoint={smoke_run}")
    assert results.value("reconstruction/mse") is not None
    (picture,) = results.pictures
    assert (Path("runs/evaluated") / picture).stat().st_size > 1000


def test_a_dry_run_of_an_evaluation_reads_no_weights(here: Path, smoke_run: Path) -> None:
    console = text_console()
    overrides = [f"encoder.checkpoint={smoke_run}"]
    start(Line(command="eval", name="knn", overrides=overrides, dry_run=True), console)
    shown = text_of(console)
    assert "17 x 2" in shown  # 16 patches and the class token, two blocks
    assert "0 trainable" in shown
    assert list(here.iterdir()) == []


def test_what_cannot_be_evaluated_says_so(here: Path, smoke_run: Path, monkeypatch) -> None:
    weights = here / "other.safetensors"
    save_file({"blocks.0.norm1.weight": torch.ones(3)}, weights)
    with pytest.raises(CheckpointError, match="does not fit the encoder"):
        evaluate("knn", f"encoder.checkpoint={weights}")
    assert read_record(Path("runs/evaluated")).state == "failed"
    with pytest.raises(CheckpointError, match="needs more than an encoder"):
        start(
            Line(
                command="eval", name="reconstruction", overrides=[f"encoder.checkpoint={weights}"]
            ),
            text_console(),
        )
    with pytest.raises(VlxError, match="no presets"):
        start(Line(command="eval", name="knn", preset="smoke"), text_console())


def test_data_without_labels_is_refused(here: Path, smoke_run: Path) -> None:
    import datasets

    digits = Digits(DataConfig(), "test")
    images = [{"image": digits.read(index)["image"]} for index in range(4)]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_list(images, features=features)
    for split in ("train", "test"):
        table.to_parquet(here / "data" / f"{split}.parquet")
    line = [f"encoder.checkpoint={smoke_run}", "data=parquet", f"data.path={here / 'data'}"]
    with pytest.raises(DataError, match="has no labels"):
        evaluate("knn", *line)


def test_weights_of_the_checkpoint_are_those_that_were_saved(smoke_run: Path) -> None:
    (last,) = sorted(smoke_run.glob("checkpoints/step-*/model.safetensors"))[-1:]
    assert load_file(last).keys() <= read_weights(smoke_run).keys()
