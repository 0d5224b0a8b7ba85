"""What others named goes through every table and message readable and harmless."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.commands.conftest import smoke_line, text_console, text_of
from tests.commands.test_pareto import GROUPS
from tests.commands.test_tables import results
from tests.data.make import encode, picture
from vlx import cli
from vlx.commands import complete, doctor
from vlx.commands.data import show
from vlx.commands.listing import keys_table, methods_table
from vlx.commands.pareto import show_tradeoffs, tradeoffs
from vlx.commands.runs import list_runs
from vlx.commands.start import print_results, start
from vlx.commands.summary import groups_table, jobs_table, over_seeds
from vlx.commands.tables import results_tables
from vlx.core import registry
from vlx.core.plain import PlainConsole, plain
from vlx.core.results import Metric
from vlx.track.console import ConsoleProgress

NAMES = ("mk[/b]", "[knn]", "\x1b]0;x\x07", "a\u202eb", "two\nlines")
FOLDERS = ("mk[b]", *NAMES[1:])  # a folder's name holds no slash


def is_harmless(text: str) -> bool:
    return text.replace("\n", "") == plain(text.replace("\n", ""))


def strange_run(run: Path, name: str) -> None:
    """Make every text of a run's files `name`."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(
        json.dumps(record | {"method": name, "preset": name, "state": name})
    )
    found = json.loads((run / "results.json").read_text())
    texts = {"name": name, "split": name, "protocol": name, "weights": name}
    found["metrics"] = [metric | texts for metric in found["metrics"]]
    found |= {"method": name, "pictures": [name], "counts": {name: [1, 2]}}
    (run / "results.json").write_text(json.dumps(found))


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_runs_and_results(name: str, smoke_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "[knn]"
    shutil.copytree(smoke_run, run)
    strange_run(run, name)
    console = text_console()
    list_runs(tmp_path / "runs", as_json=False, console=console, errors=console)
    listed = text_of(console)
    assert "[knn]" in listed
    assert f"{plain(name)} {plain(name)}" in listed
    print_results(run, console)
    pair = [
        Metric(
            name=f"{name}/{kind}", value=1, unit=name, split=name, num_samples=1,
            protocol=f"tokens@{name}", weights=name,
        )
        for kind in ("plain", "reduced")
    ]  # fmt: skip
    for table in results_tables(dataclasses.replace(results(*pair), method=name)):
        console.print(table)
    text = text_of(console)
    assert is_harmless(text)
    shown = plain(name)
    assert text.count(f"{shown} on {shown}, ") == 2  # titles
    assert f"picture: {run}/{shown}" in text
    assert "1, 2" in text
    assert text.count(shown) >= 15


@pytest.mark.parametrize("name", [*NAMES, r"$\frac$"])  # no formula to matplotlib either
def test_tables_of_sweeps(name: str, tmp_path: Path) -> None:
    groups = [
        [
            dataclasses.replace(job, id=name, state=name, swept={name: job.id, "method.x": name})
            for job in group
        ]
        for group in GROUPS
    ]
    console = text_console()
    console.print(jobs_table(name, [job for group in groups for job in group]))
    console.print(groups_table(over_seeds(groups)))
    show_tradeoffs(tmp_path, tradeoffs(groups), console)
    text = text_of(console)
    assert is_harmless(text)
    assert f"sweep {plain(name)}" in text
    assert text.count(plain(name)) > 20


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_methods_keys_sizes_and_checks(name: str, monkeypatch, tmp_path: Path) -> None:
    console = text_console()
    paper = dataclasses.replace(registry.find("mae").paper, title=name, venue=name)
    console.print(methods_table([paper]))
    key = SimpleNamespace(type=name, meaning=name)
    console.print(keys_table({name: key}, {name: {name: name}}))
    finding = doctor.Finding(name, False, name, name)
    monkeypatch.setattr(doctor, "examine", lambda _: [finding])
    doctor.doctor(console)
    text = text_of(console)
    assert is_harmless(text)
    assert text.count(plain(name)) == 2 + 5 + 3


def test_a_dry_run_shows_its_words(here: Path) -> None:
    console = text_console()
    word = "'[/b]\x1b[2J\u202e'"
    assert start(smoke_line(f"data.path={word}", dry_run=True), console) == 0
    text = text_of(console)
    assert is_harmless(text)
    assert "\\x1b[2J" in text or "\\e[2J" in text
    assert "\n  path: " in text  # the config's own lines


def test_class_and_file_names_of_data(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, name in enumerate(FOLDERS):
            folder = tmp_path / "[set]" / split / name
            folder.mkdir(parents=True)
            (folder / f"0{name}.png").write_bytes(encode(picture(number, 20)))
            (folder / f"1{name}.png").write_bytes(b"not an image")
    console = text_console()
    show("folder", [f"data.path='{tmp_path}/[set]'"], 100, console)
    text = text_of(console)
    assert is_harmless(text)
    (classes,) = [line for line in text.splitlines() if line.startswith("classes: ")]
    assert {plain(name) for name in FOLDERS} == set(classes.removeprefix("classes: ").split(", "))
    for name in FOLDERS:
        place = tmp_path / "[set]" / "train" / name / f"1{name}.png"
        assert f"unreadable: {plain(str(place))}" in text


@pytest.mark.parametrize("name", NAMES)
def test_errors_and_warnings(name: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["vlx", "show", name])
    logging.getLogger("vlx").handlers[:] = []
    with pytest.raises(SystemExit):
        cli.main()
    logging.getLogger("vlx").warning(f"class {name}")
    said = capsys.readouterr().err
    assert is_harmless(said)
    assert said.startswith("error: ")
    shown = plain(" ".join(name.split()))  # an error's line breaks become spaces
    assert shown in said.splitlines()[0]
    assert said.splitlines()[-1] == f"class {plain(name)}"


def test_progress_takes_a_title_as_it_is() -> None:
    for terminal in (False, True):
        console = PlainConsole(file=io.StringIO(), width=200)
        console._force_terminal = terminal
        progress = ConsoleProgress(console, "pretrain [/b]\x1b]0;", 0, 2)
        progress.update(1, 0.5, 10, 0)
        progress.close()
        assert r"pretrain [/b]\x1b]0;" in text_of(console)


def test_completion_leaves_out_what_a_shell_would_obey(here: Path) -> None:
    for name in ("good", "[knn]", "\x1b]0;x\x07"):
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "run.json").touch()
    words = SimpleNamespace(params={}, args=[], info_name="resume")
    assert complete.run_dirs(words, "") == ["runs/[knn]", "runs/good"]
