"""`vlx data list|show|preview`, in this process."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.data.make import HTML, encode, image_tree, picture
from vlx.commands.data import data_config, list_sources, preview, show
from vlx.core.errors import ConfigError, DataError
from vlx.core.plain import PlainConsole
from vlx.data.config import DataConfig
from vlx.data.open import SOURCES, open_source
from vlx.data.order import permute


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def console() -> Console:
    return PlainConsole(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_list_names_every_source_and_conf(console: Console) -> None:
    list_sources(console)
    for name in (*SOURCES, "imagefolder", "cifar10"):
        assert name in printed(console)


def test_show_counts_names_and_finds_the_damaged(tmp_path: Path, console: Console) -> None:
    image_tree(tmp_path / "set")
    damaged = tmp_path / "set" / "train" / "bee" / "003.png"
    damaged.write_bytes(HTML)
    show("folder", [f"data.path={tmp_path / 'set'}"], 100, console)
    text = printed(console)
    assert "24" in text
    assert "20x20" in text
    assert "classes: ant, bee, cat" in text
    assert "1 of 24" in text
    assert f"unreadable: {damaged}: not an image" in text


def test_show_without_a_test_split_still_shows_the_training_split(
    tmp_path: Path, console: Console
) -> None:
    import shutil

    image_tree(tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "test")
    show("folder", [f"data.path={tmp_path / 'set'}"], 4, console)
    assert "test: " in printed(console)
    assert "24" in printed(console)


def test_names_and_keys_are_checked_with_the_nearest() -> None:
    assert data_config("imagefolder", []).test_split == "val"
    assert data_config("webdataset", ["data.workers=3"]).workers == 3
    with pytest.raises(DataError, match=r"Did you mean .*folder"):
        data_config("foldr", [])
    with pytest.raises(ConfigError, match=r"unknown key 'data\.pth'. Did you mean data\.path"):
        data_config("folder", ["data.pth=x"])
    with pytest.raises(ConfigError, match=r"data\.workers='many' must be a int"):
        data_config("folder", ["data.workers=many"])


def test_preview_draws_what_the_method_will_see(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "preview.png"
    assert preview("mae", "smoke", ["track=none"], out, 4) == out
    with Image.open(out) as picture:
        pixels = np.asarray(picture)
    assert picture.width > 2 * 96  # two columns of 8x8 digits, enlarged to 96
    # The first row is the first sample of the run's first step, as stored.
    source = open_source(DataConfig(), "train")
    first = int(permute(np.arange(1), len(source), 0, 0)[0])
    enlarged = np.asarray(source.read(first)["image"]).repeat(12, 0).repeat(12, 1)
    np.testing.assert_array_equal(pixels[22 : 22 + 96, 6 : 6 + 96], enlarged)


def captioned_table(folder: Path) -> Path:
    """A table of four images, one without a usable caption."""
    folder.mkdir()
    rows = ["image,caption"]
    for number, text in enumerate(("a small cat", "a dog", "  ", "a small cat")):
        (folder / f"{number}.png").write_bytes(encode(picture(number, 32)))
        rows.append(f"{number}.png,{text}")
    (folder / "captions.csv").write_text("\n".join([*rows, "1.png,[brown] :train: again"]))
    return folder / "captions.csv"


def test_show_counts_captions_and_shows_some(tmp_path: Path) -> None:
    file = captioned_table(tmp_path / "set")
    console = PlainConsole(file=io.StringIO(), width=200)
    show("captions", [f"data.path={file}", "data.train_split=all"], 10, console)
    text = printed(console)
    line = "4 for 4 samples, 1 to 2 a sample (mean 1.33), longest 3 words, duplicates 1, samples"
    assert f"captions of all: {line} without a usable one 1" in text
    assert f"  {tmp_path}/set/0.png: a small cat" in text
    assert f"unusable caption: {tmp_path}/set/2.png: empty caption" in text
    assert f"unreadable: {tmp_path}/set/2.png: empty caption" in text


def test_show_prints_captions_and_splits_as_they_are(tmp_path: Path) -> None:
    from vlx import cli

    with cli.console.capture() as printed_text:
        cli.console.print("captions of google:train: 8")  # rich knows :train: as an emoji
    assert printed_text.get() == "captions of google:train: 8\n"


def test_preview_draws_captions_beside_the_views(tmp_path: Path) -> None:
    file = captioned_table(tmp_path / "set")
    out = tmp_path / "preview.png"
    data = ["data=captions", f"data.path={file}", "data.corrupt_limit=0.5", "track=none"]
    preview("mae", "smoke", [*data, "encoder.image_size=32", "encoder.patch_size=4"], out, 2)
    with Image.open(out) as drawn:
        pixels = np.asarray(drawn.convert("L"))
    panel = pixels[22:, -240:]
    assert (panel < 100).any()  # letters
    assert drawn.width > 2 * 96 + 240
