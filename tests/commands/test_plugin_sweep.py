"""Hydra's own launchers and sweepers over vlx's jobs."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import yaml

from tests.commands.conftest import CHEAP, smoke_line, text_console
from vlx.commands.start import start
from vlx.commands.sweep_file import read_jobs
from vlx.config import hydra_app
from vlx.core.errors import VlxError
from vlx.core.results import read_results
from vlx.engine.rundir import read_record


def need(plugin: str) -> None:
    if importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip(f"{plugin} is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
    ],
    ids=["joblib", "submitit"],
)
def test_a_launcher_starts_the_jobs(cli, tmp_path: Path, words: list[str]) -> None:
    need(f"hydra_{words[0].split('=')[1].split('_')[0]}_launcher")
    line = ["pretrain", "mae", "--preset", "smoke", "seed=0,1", *words, *CHEAP, "-m", "name=s"]
    done = cli(*line)
    folder = tmp_path / "runs" / "sweeps" / "s"
    jobs = read_jobs(folder)
    assert [(job.id, job.swept) for job in jobs] == [
        ("000-seed_0", {"seed": "0"}),
        ("001-seed_1", {"seed": "1"}),
    ]
    for job in jobs:
        run = folder / job.run_dir
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config == job.config
        assert config["track"]["group"] == "s"
        assert read_record(run).sweep == "s"
        assert hydra_app.objective(run, None) == read_results(run).value("knn/top1")
    assert [job.exit_code for job in jobs] == [0, 0]
    summary = json.loads((folder / "sweep.json").read_text())
    assert summary["over_seeds"][0]["seeds"] == [0, 1]
    assert "± " in done.stdout


def test_mistakes_are_told_before_hydra_starts(here: Path) -> None:
    for words in (["seed=0,x"], ["sed=0,1"], ["seed=interval(0,1)", "train.steps=x"]):
        line = smoke_line("hydra/launcher=joblib", *words, multirun=True)
        with pytest.raises(VlxError):
            start(line, text_console())
    with pytest.raises(VlxError, match="hydra-optuna-sweeper"):
        start(smoke_line("hydra/sweeper=optuna", "seed=0,1", multirun=True), text_console())
    assert list(here.iterdir()) == []


def test_the_objective_is_the_named_metric_or_the_first(smoke_run: Path, here: Path) -> None:
    value = read_results(smoke_run).value("knn/top1")
    assert hydra_app.objective(smoke_run, None) == value
    assert hydra_app.objective(smoke_run, "knn/top1") == value
    assert math.isnan(hydra_app.objective(smoke_run, "knn/top5"))
    assert math.isnan(hydra_app.objective(here, None))


def test_what_varies_is_told_by_keys() -> None:
    plan = hydra_app.Plan(
        command="",
        name="",
        preset=None,
        fixed=["recipe"],
        static=["train.compile"],
        objective=None,
        fail_fast=False,
    )
    assert hydra_app.varying(["train.compile=False", "seed=3"], plan) == {"seed": "3"}
