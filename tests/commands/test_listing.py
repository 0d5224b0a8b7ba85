"""`vlx list`, `vlx show` and `vlx doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.commands.conftest import text_console, text_of
from vlx import cli
from vlx.commands.doctor import Finding, doctor, examine
from vlx.commands.listing import select, show
from vlx.core import registry
from vlx.core.errors import VlxError
from vlx.core.paper import Paper


def paper(slug: str, **words: object) -> Paper:
    known: dict = {
        "number": 1,
        "slug": slug,
        "title": f"On {slug}",
        "year": 2025,
        "venue": "CVPR",
        "url": "https://example.org",
        "family": "masked",
        "commands": ("pretrain-mim",),
        "modalities": ("image",),
    }
    return Paper(**{**known, **words})


PAPERS = [
    paper("one"),
    paper("two", family="clip", commands=("align",), modalities=("image", "text"), year=2024),
    paper("three", commands=("pretrain-mim", "finetune"), title="Video tubes"),
]


@pytest.mark.parametrize(
    ("filters", "slugs"),
    [
        ({}, ["one", "two", "three"]),
        ({"command": "pretrain"}, ["one", "three"]),
        ({"command": "finetune"}, ["three"]),
        ({"family": "clip"}, ["two"]),
        ({"modality": "image"}, ["one", "two", "three"]),
        ({"modality": "text"}, ["two"]),
        ({"search": "TUBES"}, ["three"]),
        ({"search": "2024"}, ["two"]),
        ({"command": "pretrain-mim", "search": "one"}, ["one"]),
        ({"search": "nothing"}, []),
    ],
)
def test_filters_compose(filters: dict[str, str], slugs: list[str]) -> None:
    assert [found.slug for found in select(PAPERS, **filters)] == slugs


def test_an_unknown_filter_value_gets_the_nearest() -> None:
    with pytest.raises(VlxError, match=r"--family clp is unknown\. Did you mean clip"):
        select(PAPERS, family="clp")


def test_json_lists_every_method_with_its_presets() -> None:
    rows = json.loads(CliRunner().invoke(cli.app, ["list", "--json"]).output)
    assert [row["slug"] for row in rows] == sorted(registry.papers())
    mae = next(row for row in rows if row["slug"] == "mae")
    assert {"smoke", "tiny", "paper"} <= set(mae["presets"])
    assert mae["commands"] == ["pretrain-mim"]


def test_show_tells_the_paper_the_keys_the_presets_and_the_data() -> None:
    console = text_console()
    show("mae", console)
    lines = text_of(console).splitlines()
    text = "\n".join(lines)
    assert "He et al., CVPR 2022" in text
    assert "--preset smoke: Seconds" in text
    (row,) = [line for line in lines if "method.decoder_dim" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:4] == ["method.decoder_dim", "integer", "48", "512"]  # tiny, paper
    assert "Width of the decoder" in cells[4]
    assert any("train.precision" in line and "fp32 | bf16 | fp16" in line for line in lines)
    assert not any("slug" in line.split("│")[1] for line in lines if line.startswith("│"))
    data = lines[lines.index("the data must contain:") :]
    assert data[1].strip().startswith("image: B 3 H W")
    assert any("RandomResizedCrop" in line for line in data)


def test_doctor_names_every_part_and_what_to_type(here: Path) -> None:
    console = text_console()
    assert doctor(console) == 0
    shown = text_of(console)
    for about in ("torch", "device", "precision", "W&B", "runs", "torch.compile", "gloo"):
        assert about in shown
    cifar = next(finding for finding in examine(here / "runs") if finding.about == "CIFAR-10")
    assert not cifar.works
    assert "data.path" in cifar.remedy
    assert list(here.iterdir()) == []


def test_doctor_fails_where_nothing_can_run(here: Path) -> None:
    (here / "file").write_text("")
    (found,) = [f for f in examine(here / "file" / "runs") if f.about == "runs"]
    assert not found.works
    assert found.essential
    assert doctor(text_console(), here / "file" / "runs") == 2


def test_doctor_survives_a_check_that_breaks(here: Path, monkeypatch) -> None:
    from vlx.commands import doctor as module

    def broken() -> Finding:
        raise OSError("no libjpeg")

    monkeypatch.setattr(module, "_decoding", broken)
    (found,) = [finding for finding in examine(here) if finding.about == "decoding"]
    assert not found.works
    assert "no libjpeg" in found.detail


def test_version_and_bare_vlx() -> None:
    runner = CliRunner()
    assert runner.invoke(cli.app, ["--version"]).output.strip()
    assert "pretrain-mim" in runner.invoke(cli.app, []).output
