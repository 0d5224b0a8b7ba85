"""Reliability 13: a mistake on the command line is answered in one line, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# What is typed after `vlx`, and what the answer must say.
MISTAKES: list[tuple[list[str], list[str]]] = [
    (["pretrain", "maee"], ["unknown method 'maee'", "Did you mean mae"]),
    (["align", "mae"], ["vlx pretrain-mim mae"]),
    (["eval", "linear-prob"], ["'linear-prob'", "linear-probe"]),
    (["eval", "mae"], ["vlx pretrain-mim mae"]),
    (["eval", "knn"], ["encoder.checkpoint is missing"]),
    (["eval", "knn", "encoder.checkpoint=nowhere"], ["nowhere", "does not exist"]),
    (["eval", "knn", "encoder.checkpoint=.", "optim.lr=1"], ["unknown key 'optim.lr'"]),
    (["pretrain", "mae", "--preset", "tinny"], ["no preset 'tinny'", "tiny"]),
    (["pretrain", "mae", "--preset", "nowhere.yaml"], ["nowhere.yaml"]),
    (["pretrain", "mae", "--preset", "typo.yaml"], ["'train.stps'", "train.steps"]),
    (["pretrain", "mae", "--preset", "wrong.yaml"], ["train.steps=many must be an integer"]),
    (["pretrain", "mae", "encoder=vit_bse"], ["no encoder 'vit_bse'", "vit_base"]),
    (["pretrain", "mae", "encoder=null"], ["'encoder=null' must be one of", "vit_base"]),
    (["pretrain", "mae", "train.stps=3"], ["unknown key 'train.stps'", "train.steps"]),
    (["pretrain", "mae", "mask_ratoi=0.5"], ["method.mask_ratio"]),
    (["pretrain", "mae", "optim.betas.0=1"], ["unknown key 'optim.betas.0'"]),
    (["pretrain", "mae", "train.steps=abc"], ["train.steps=abc must be an integer"]),
    (["pretrain", "mae", "train.steps=1.5"], ["train.steps=1.5 must be an integer"]),
    (["pretrain", "mae", "method.mask_ratio=high"], ["method.mask_ratio=high must be a number"]),
    (["pretrain", "mae", "train.compile=maybe"], ["train.compile=maybe must be true or false"]),
    (["pretrain", "mae", "optim.betas=3"], ["optim.betas=3 must be a list"]),
    (["pretrain", "mae", "optim.betas=[a,b]"], ["optim.betas[0]=a must be a number"]),
    (["pretrain", "mae", "train.batch_size=null"], ["other than null"]),
    (["pretrain", "mae", "train.epochs=nan"], ["train.epochs=nan must be a finite number"]),
    (["pretrain", "mae", "train.batch_size=0"], ["train.batch_size must be at least 1, got 0"]),
    (["pretrain", "mae", "train.precision=bf17"], ["train.precision=bf17", "fp32, bf16, fp16"]),
    (["pretrain", "mae", "train.steps="], ["'train.steps=' has no value"]),
    (["pretrain", "mae", "train.steps"], ["cannot read 'train.steps'", "key=value"]),
    (["pretrain", "mae", "train.steps==3"], ["cannot read 'train.steps==3'"]),
    (["pretrain", "mae", "+train.foo=1"], ["unknown key 'train.foo'"]),
    (["pretrain", "mae", "+train.steps=3"], ["Write train.steps=3"]),
    (["pretrain", "mae", "~train.steps"], ["train.steps=null"]),
    (["pretrain", "mae", "train=3"], ["'train' is a section", "train.epochs"]),
    (["pretrain", "mae", "encoder@foo=vit_base"], ["encoder=NAME"]),
    (["pretrain", "mae", "teacher.name=x"], ["+encoder@teacher=vit_base"]),
    (["pretrain", "mae", "preset=smoke"], ["--preset smoke"]),
    (["pretrain", "mae", "method=gmml"], ["vlx COMMAND gmml"]),
    (["pretrain", "mae", "name='a/b'"], ["name='a/b'", "without '/'"]),
    (["pretrain", "mae", "name='${nothing}'"], ["nothing"]),
    (["pretrain", "mae", "seed=0,1"], ["seed=0,1", "add -m"]),
    (["pretrain", "mae", "hydra/launcher=joblib"], ["-m"]),
    (["pretrain", "mae", "-m", "seed=0"], ["several values"]),
    (["pretrain", "mae", "-m", "seed=0,x"], ["job seed=x", "must be an integer"]),
    (["pretrain", "mae", "-m", "seed=0,1", "name=a,b"], ["'name=a,b' cannot vary"]),
    (["pretrain", "mae", "-m", "seed=interval(0,1)"], ["hydra/sweeper"]),
    (["pretrain", "mae", "-m", "encoder=glob(nothing*)"], ["matches nothing"]),
    (["pretrain", "mae", "-m", "hydra/launcher=joblob", "seed=0,1"], ["'joblob'", "joblib"]),
    (["pretrain", "mae", "--jobs", "0", "-m", "seed=0,1"], ["--jobs 0"]),
    (["pretrain", "mae", "--jobs", "two"], ["--jobs"]),
    (["pretrain", "mae", "--cfg", "hydra"], ["--cfg job"]),
    (["pretrain", "mae", "--prset", "smoke"], ["--prset", "--preset"]),
    (["pretrain", "mae", "--preset"], ["--preset"]),
    (["pretrain"], ["method"]),
    (["pretrian", "mae"], ["pretrian", "pretrain"]),
    (["pretrain", "mae", "encoder=vit_smal_patch16_224"], ["vit_small_patch16_224"]),
    (["pretrain", "mae", "+encoder@teacher=vit_bse_patch16_224"], ["vit_base_patch16_224"]),
    (["pretrain", "mae", "-m", "encoder=digits,resnet19"], ["no encoder 'resnet19'", "resnet1"]),
    (["pretrain", "mae", "--sweep"], ["--sweep: mae names no rates", "-m"]),
    (["eval", "knn", "--sweep", "encoder.checkpoint=."], ["--sweep: knn names no rates"]),
    (["prune-tokens", "evit", "keep_rat=0.7"], ["unknown key 'keep_rat'", "method.keep_rate"]),
    (["prune-tokens", "evit", "keep_rate=most"], ["method.keep_rate=most must be a number"]),
    (["prune-tokens", "evit", "keep_rate=0"], ["method.keep_rate=0.0 must lie in (0, 1]"]),
    (["prune-tokens", "evit", "keep_rate=1.1"], ["method.keep_rate=1.1 must lie in (0, 1]"]),
    (["prune-tokens", "tome", "r=-1"], ["method.r=-1 must be 0"]),
    (["prune-tokens", "tome", "keep_rate=0.7"], ["unknown key 'keep_rate'"]),
    (["prune-tokens", "evit", "--sweep", "keep_rate=0.9"], ["several values"]),
    (["prune-tokens", "evit", "--sweep", "keep_rate=0.9,2"], ["job method.keep_rate=2", "(0, 1]"]),
    (["prune-tokens", "evit", "--sweep", "--cfg", "hydra"], ["--cfg job"]),
    (["list", "--jsn"], ["--jsn", "--json"]),
    (["list", "--family", "maksed"], ["--family maksed", "masked"]),
    (["list", "--command", "pretrian"], ["pretrain"]),
    (["show", "maee"], ["mae"]),
    (["resume", "nowhere"], ["nowhere is not a run directory"]),
    (["rerun", "nowhere"], ["nowhere is not a run directory"]),
    (["sweep", "nowhere"], ["nowhere is not a sweep"]),
    (["runs", "nowhere"], ["no directory nowhere"]),
]

# Runs every line in one process as `main` does, and reports what was said and imported.
_SCRIPT = """
import contextlib, io, json, sys
from vlx import cli
answers = []
for line in json.load(sys.stdin):
    sys.argv = ["vlx", *line]
    cli.errors.file, out = io.StringIO(), io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(out):
            cli.main()
    except SystemExit as end:
        code = end.code
    answers.append({"code": code, "stderr": cli.errors.file.getvalue(), "stdout": out.getvalue()})
heavy = [name for name in ("torch", "timm", "wandb", "transformers") if name in sys.modules]
print(json.dumps({"answers": answers, "heavy": heavy}))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict:
    place = tmp_path_factory.mktemp("mistakes")
    (place / "typo.yaml").write_text("train:\n  stps: 3\n")
    (place / "wrong.yaml").write_text("train:\n  steps: many\n")
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        input=json.dumps([line for line, _ in MISTAKES]),
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    report["left"] = sorted(path.name for path in place.iterdir())
    return report


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_answered_in_one_line_with_exit_code_2(said: dict, number: int) -> None:
    answer, words = said["answers"][number], MISTAKES[number][1]
    assert answer["code"] == 2
    assert answer["stderr"].startswith("error: ")
    assert answer["stderr"].count("\n") == 1
    assert answer["stdout"] == ""
    for word in words:
        assert word in answer["stderr"]


def test_mistakes_import_nothing_heavy_and_leave_nothing_behind(said: dict) -> None:
    assert said["heavy"] == []
    assert said["left"] == ["typo.yaml", "wrong.yaml"]


def test_a_real_process_answers_alike(cli, tmp_path: Path) -> None:
    done = cli("pretrain", "mae", "train.stps=3", check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", [["--help"], ["list"], ["list", "--json"], ["pretrain", "--help"]])
def test_help_and_list_import_nothing_heavy(line: list[str]) -> None:
    script = (
        "import sys; from vlx import cli; sys.argv = ['vlx', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'wandb', 'numpy', 'timm'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script, *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mae" in done.stdout or "--" in done.stdout
