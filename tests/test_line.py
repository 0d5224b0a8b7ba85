"""The whole line: one command from nothing to numbers and pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlx.core.results import read_results


def test_pretrain_mae_smoke_writes_results_and_a_picture(cli, tmp_path: Path) -> None:
    done = cli("pretrain", "mae", "--preset", "smoke", "track=none", "name=first")
    run = tmp_path / "runs" / "first"
    assert "linear-probe/top1" in done.stdout
    results = read_results(run)
    assert results.steps == 4
    assert results.value("knn/top1") is not None
    assert results.value("knn/top1", "untrained") is not None
    with Image.open(run / "pictures" / "reconstruction-trained.png") as picture:
        assert picture.width > 400


def test_a_method_of_another_command_names_that_command(cli) -> None:
    done = cli("align", "mae", check=False)
    assert done.returncode == 2
    assert "vlx pretrain-mim mae" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
