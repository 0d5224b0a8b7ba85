"""Runs that several tests of commands share."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from vlx.commands.start import Line, start
from vlx.core.plain import PlainConsole

# The cheapest run with a number in its results.
CHEAP = ("track=none", "train.steps=2", "eval.at_end=[knn]", "eval.compare_untrained=false")


def text_console() -> Console:
    """A wide console whose text is read with `console.file.getvalue()`."""
    return PlainConsole(file=io.StringIO(), width=200)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def smoke_line(*overrides: str, **words: object) -> Line:
    return Line(
        command="pretrain-mim",
        name="mae",
        preset="smoke",
        overrides=[*CHEAP, *overrides],
        **words,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of MAE's smoke preset, made in this process. Never written to."""
    runs = tmp_path_factory.mktemp("shared-runs")
    assert start(smoke_line(f"runs_dir={runs}", "name=smoke"), text_console()) == 0
    return runs / "smoke"


@pytest.fixture
def here(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty working directory, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return tmp_path
