"""`--dry-run`: sizes and costs of any preset, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.commands.conftest import smoke_line, text_console, text_of
from vlx.commands.start import Line, start
from vlx.commands.tables import shorten


def dry(preset: str, *overrides: str) -> str:
    console = text_console()
    line = Line(
        command="pretrain-mim", name="mae", preset=preset, overrides=overrides, dry_run=True
    )
    assert start(line, console) == 0
    return text_of(console)


def test_the_paper_preset_shows_the_published_sizes_and_writes_nothing(here: Path) -> None:
    text = dry("paper", "data=cifar10", "data.path=nowhere")
    for shown in (
        "111,655,680 trainable",
        "GMACs",
        "9.694",
        "tokens in encoder.vit.blocks",
        "50 x 12",  # a quarter of 196 patches and the class token, in 12 blocks
        "197 x 8",  # all of them in the decoder's 8
        "unknown, 1600 epochs",
        "0.0024 = 0.00015 x batch 4096 / 256",
        "GiB",
    ):
        assert shown in text, shown
    assert list(here.iterdir()) == []


def test_the_config_follows_in_full(here: Path) -> None:
    console = text_console()
    start(smoke_line("seed=5", dry_run=True), console)
    config = yaml.safe_load(text_of(console).split("└", 1)[1].split("\n", 1)[1])
    assert config["seed"] == 5
    assert config["method"]["decoder_dim"] == 24


def test_epochs_become_steps_where_the_data_is_there(here: Path) -> None:
    # 1437 training digits, 128 a step: 11 steps an epoch
    assert "2,860, 260 epochs of 1,437 samples" in dry("tiny")
    assert "larger than the 1437 samples" in dry("tiny", "train.batch_size=2000")
    assert "22, 2 epochs" in dry("tiny", "train.steps=22")


def test_processes_and_absolute_rates_are_shown(here: Path) -> None:
    text = dry("smoke", "launcher=torchrun", "launcher.processes=4")
    assert "4 of them" in text
    assert "0.001 (optim.lr)" in text


@pytest.mark.parametrize(
    ("counts", "text"), [([50, 50, 50], "50 x 3"), ([4, 3, 3, 1], "4, 3 x 2, 1"), ([], "")]
)
def test_equal_counts_are_shortened(counts: list[int], text: str) -> None:
    assert shorten(counts) == text
