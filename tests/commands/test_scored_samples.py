"""Scores on training data: refused before anything is computed, or asked for and marked."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import pytest

from tests.commands.conftest import smoke_line, text_console, text_of
from tests.data.make import image_tree
from vlx.commands.runs import list_runs
from vlx.commands.start import Line, start
from vlx.core.errors import DataError
from vlx.core.results import read_results
from vlx.engine.loop import Trainer
from vlx.engine.rundir import read_record
from vlx.evals import base
from vlx.evals.registry import EVALUATORS, FITTED, evaluator

SAID = "scored on training data: 1437 of 1797 samples, of digits/train"


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a step nor an evaluation."""

    def fail(*args: object, **keys: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(Trainer, "_gradients", fail)
    monkeypatch.setattr(base, "extract", fail)


def evaluate(name: str, *overrides: str) -> str:
    console = text_console()
    assert start(Line(command="eval", name=name, overrides=[*overrides, "name=e"]), console) == 0
    return " ".join(text_of(console).split())


def as_encoder(run: Path, here: Path) -> tuple[str, ...]:
    """The encoder's weights as a file, of which nothing says what they were trained on."""
    from safetensors.torch import save_file

    from vlx.encoders.checkpoint import read_weights

    prefix = "encoder.vit."
    own = {k.removeprefix(prefix): v for k, v in read_weights(run).items() if k.startswith(prefix)}
    save_file(own, here / "encoder.safetensors")
    size = ("encoder=digits", "encoder.dim=48", "encoder.depth=2")
    return ("encoder.checkpoint=encoder.safetensors", *size)


@pytest.mark.parametrize("words", [
    ("data.test_split=all",),
    ("data.train_split=test", "data.test_split=test"),
    ("data.train_split=all", "data.shots=100"),  # of what a run trains on, what it scores
    ("data.val_split=all", "eval.every_steps=1"),
])  # fmt: skip
def test_a_run_that_would_score_what_it_trains_on_is_refused(
    here: Path, no_step: None, words: tuple[str, ...]
) -> None:
    key = "data.val_split=all" if "val_split" in words[0] else r"data\.test_split="
    with pytest.raises(
        DataError, match=rf"{key}.* would be scored on training data: .*data\.test_"
    ):
        start(smoke_line(*words, "name=refused"), text_console())
    assert read_record(here / "runs" / "refused").state == "failed"
    assert not (here / "runs" / "refused" / "checkpoints").exists()


def test_a_run_that_is_asked_to_marks_its_results(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = text_console()
    words = ("data.test_split=all", "data.test_on_train=true", "name=asked")
    assert start(smoke_line(*words), console) == 0
    assert read_results(Path("runs/asked")).on_training_data == SAID
    assert SAID in " ".join(text_of(console).split())
    listed = text_console()
    list_runs(Path("runs"), as_json=False, console=listed, errors=listed)
    assert "scored on training data" in text_of(listed)
    capsys.readouterr()
    list_runs(Path("runs"), as_json=True, console=listed, errors=listed)
    assert json.loads(capsys.readouterr().out)[0]["on_training_data"] == SAID


def test_other_splits_are_not_marked(smoke_run: Path) -> None:
    assert read_results(smoke_run).on_training_data == ""


def test_a_sweep_names_its_jobs_that_scored_training_data(here: Path) -> None:
    console = text_console()
    words = ("data.test_split=all,test", "data.test_on_train=true", "name=swept")
    assert start(smoke_line(*words, multirun=True), console) == 0
    assert "scored on training data: 000\n" in text_of(console)
    summary = json.loads(next(Path("runs").rglob("sweep.json")).read_text())
    assert [job["on_training_data"] for job in summary["jobs"]] == [SAID, ""]


def test_a_run_that_scores_nothing_may_train_on_all(here: Path) -> None:
    assert start(smoke_line("data.train_split=all", "eval.at_end=[]"), text_console()) == 0


def test_what_an_evaluator_fits_on_is_not_scored(here: Path, smoke_run: Path) -> None:
    words = (*as_encoder(smoke_run, here), "data.test_split=train")
    with pytest.raises(DataError, match=r"would be scored on training data: 1437 of 1437 samples"):
        evaluate("knn", *words)
    shutil.rmtree("runs")
    shown = evaluate("knn", *words, "data.test_on_train=true")
    assert "scored on training data: 1437 of 1437 samples, of digits/train" in shown


def test_a_run_is_not_scored_on_what_it_was_trained_on(here: Path, smoke_run: Path) -> None:
    """Whatever the evaluation calls it, and wherever it lies."""
    words = (f"encoder.checkpoint={smoke_run}", "data.train_split=test", "data.test_split=train")
    with pytest.raises(DataError, match=r"1437 of 1437 samples, of digits/train"):
        evaluate("knn", *words)
    with pytest.raises(DataError, match=r"1437 of 1437 samples, of digits/train"):
        evaluate("reconstruction", *words, "name=other")
    tree = image_tree(here / "one")
    words = ("data=folder", f"data.path={tree}", "data.workers=0", "name=trained")
    assert start(smoke_line(*words, "train.batch_size=8"), text_console()) == 0
    copied = here / "two" / "test"
    shutil.copytree(tree / "train", copied)
    shutil.copytree(tree / "test", here / "two" / "train")
    words = ("encoder.checkpoint=runs/trained", "data=folder", f"data.path={copied.parent}")
    with pytest.raises(DataError, match=r"24 of 24 samples, of one/train/train"):
        evaluate("knn", *words, "name=moved")
    # The run's data is gone: its fingerprint is known still.
    shutil.rmtree(tree)
    with pytest.raises(DataError, match=r"24 of 24 samples"):
        evaluate("knn", *words, "name=gone")


def test_what_fits_on_the_training_split_is_listed() -> None:
    """Other evaluators score published weights on any split: nothing was trained on it here."""
    fitting = {name for name in EVALUATORS if 'features(subject, "train")' in source_of(name)}
    assert fitting == set(FITTED)


def source_of(name: str) -> str:
    return inspect.getsource(type(evaluator(name)))
