"""`vlx eval`: a plain encoder from a run or a file, on any labelled source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from tests.commands.conftest import CHEAP, text_console, text_of
from vlx.commands.start import Line, start
from vlx.core.capability import Capability, DualEncoder, ImageFeatures
from vlx.core.errors import CheckpointError, ConfigError, DataError, VlxError
from vlx.core.results import Results, read_results
from vlx.data.cache import cache_dir
from vlx.data.config import DataConfig
from vlx.data.sources.digits import Digits
from vlx.encoders.checkpoint import read_weights
from vlx.engine.rundir import read_record


def evaluate(name: str, *overrides: str, run: str = "evaluated") -> tuple[Results, str]:
    console = text_console()
    line = Line(command="eval", name=name, overrides=[*overrides, f"name={run}"])
    assert start(line, console) == 0
    return read_results(Path("runs") / run), text_of(console)


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
    failed = read_record(Path("runs/evaluated"))
    assert failed.state == "failed"
    with pytest.raises(CheckpointError, match="does not fit the encoder"):
        evaluate("knn", f"encoder.checkpoint={weights}")  # the name is free again
    assert read_record(Path("runs/evaluated")).wandb_id != failed.wandb_id
    with pytest.raises(CheckpointError, match="needs more than an encoder"):
        start(
            Line(
                command="eval", name="reconstruction", overrides=[f"encoder.checkpoint={weights}"]
            ),
            text_console(),
        )
    with pytest.raises(ConfigError, match=r"needs ReducedTokens, which mae .* by knn"):
        evaluate("tokens", f"encoder.checkpoint={smoke_run}")
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


class Dual(DualEncoder):
    """Images of a method's encoder against texts drawn by their own seed."""

    logit_scale = 1.0

    def __init__(self, images: ImageFeatures) -> None:
        self.images = images

    def joint_image_features(self, images: Tensor) -> Tensor:
        return normalize(self.images.image_features(images), dim=1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        draws = [torch.Generator().manual_seed(crc32(text.encode())) for text in texts]
        return normalize(torch.stack([torch.randn(48, generator=draw) for draw in draws]), dim=1)


@pytest.fixture
def dual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a run of MAE one of a dual encoder."""
    from vlx.methods.mae import Mae

    exports = Mae.exports

    def with_texts(self: Mae) -> tuple[Capability, ...]:
        found = exports(self)
        images = next(part for part in found if isinstance(part, ImageFeatures))
        return *found, Dual(images)

    monkeypatch.setattr(Mae, "exports", with_texts)


def test_a_whole_run_is_evaluated_with_its_weights(here: Path, smoke_run: Path, dual: None) -> None:
    results, _ = evaluate("zero-shot", f"encoder.checkpoint={smoke_run}")
    assert 0 < results.value("zero-shot/top1") < 0.5
    assert sum(results.counts["zero-shot/samples-by-class"]) == 360
    assert results.pictures == ["pictures/confusions-trained.png"]
    assert "most often confused" in (here / "runs/evaluated/log.txt").read_text()
    of_run = f"encoder.checkpoint={smoke_run}"
    other, _ = evaluate("zero-shot", of_run, "eval.template_list=['number {}']", run="own")
    assert other.counts["zero-shot/hits-by-class"] != results.counts["zero-shot/hits-by-class"]
    with pytest.raises(ConfigError, match=r"'digit' has no \{\} where the class name goes"):
        evaluate("zero-shot", of_run, "eval.template_list=[digit]")
    with pytest.raises(DataError, match="digits has no captions, which retrieval needs"):
        evaluate("retrieval", of_run, run="without")


def test_features_are_read_again_where_nothing_changed(here: Path, smoke_run: Path) -> None:
    def files() -> set[Path]:
        return set((cache_dir() / "features").glob("*"))

    def told(number: int) -> int:
        return (here / f"runs/{number}/log.txt").read_text().count("features read from")

    def again(number: int, *overrides: str, name: str = "knn") -> float | None:
        of_run = f"encoder.checkpoint={smoke_run}"
        results, _ = evaluate(name, of_run, "data.workers=0", *overrides, run=str(number))
        return results.value(f"{name}/top1")

    first = again(0)
    kept = files()
    assert (len(kept), told(0)) == (2, 0)
    assert all(file.suffix == ".safetensors" for file in kept)
    assert (again(1), files(), told(1)) == (first, kept, 2)
    again(2, name="linear-probe")
    assert (files(), told(2)) == (kept, 2)
    again(3, "eval.crop_ratio=0.75")
    assert (len(files()), told(3)) == (4, 0)
    again(4, "eval.cache_features=false", "encoder.image_size=16")
    assert (len(files()), told(4)) == (4, 0)
    for file in kept:
        file.write_bytes(file.read_bytes()[:100])
    assert (again(5), told(5)) == (first, 0)
    assert (again(6), told(6)) == (first, 2)
    again(7, "eval.squeeze=true")
    again(8, "eval.interpolation=bilinear")
    assert (len(files()), told(7), told(8)) == (8, 0, 0)


def test_weights_of_the_checkpoint_are_those_that_were_saved(smoke_run: Path) -> None:
    (last,) = sorted(smoke_run.glob("checkpoints/step-*/model.safetensors"))[-1:]
    assert load_file(last).keys() <= read_weights(smoke_run).keys()
