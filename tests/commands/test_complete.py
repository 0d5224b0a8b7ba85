"""Shell completion, by the protocol that the shells' scripts use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# (what is typed, words that must be offered, words that must not)
LINES: list[tuple[str, set[str], set[str]]] = [
    ("vlx pre", {"pretrain", "pretrain-mim"}, {"align"}),
    ("vlx pretrain m", {"mae"}, set()),
    ("vlx align m", set(), {"mae"}),
    ("vlx show m", {"mae"}, set()),
    ("vlx eval k", {"knn"}, {"linear-probe"}),
    ("vlx pretrain mae --preset s", {"smoke"}, {"tiny"}),
    ("vlx pretrain mae seed=1 -p ", {"smoke", "tiny", "paper"}, set()),
    ("vlx pretrain mae --dry", {"--dry-run"}, set()),
    ("vlx pretrain mae method.mask", {"method.mask_ratio="}, {"method.flip="}),
    ("vlx pretrain mae seed=1 train.pre", {"train.precision="}, set()),
    ("vlx pretrain mae -m enc", {"encoder=", "encoder.dim="}, set()),
    ("vlx pretrain mae train.precision=b", {"train.precision=bf16"}, {"train.precision=fp32"}),
    ("vlx pretrain mae train.compile=", {"train.compile=true"}, set()),
    ("vlx pretrain mae encoder=vit_s", {"encoder=vit_small"}, {"encoder=cifar"}),
    ("vlx pretrain mae data.source=d", {"data.source=digits"}, set()),
    # as bash breaks them
    ("vlx pretrain mae train.precision =", {"fp32", "bf16", "fp16"}, set()),
    ("vlx pretrain mae train.precision = b", {"bf16"}, {"fp32"}),
    ("vlx pretrain mae encoder = vit_s", {"vit_small"}, {"cifar"}),
    ("vlx pretrain mae sl", set(), {"slug="}),
    ("vlx eval knn encoder.ch", {"encoder.checkpoint="}, set()),
    ("vlx eval knn opt", set(), {"optim=", "optim.lr="}),
    ("vlx resume r", {"runs/first"}, set()),
    ("vlx sweep r", {"runs/sweeps/s"}, set()),
]

# Answers every line as a fresh process would; the environment is what a shell sets.
_SCRIPT = """
import contextlib, io, json, os, sys
from vlx import cli
answers = []
for line in json.load(sys.stdin):
    os.environ.update(_VLX_COMPLETE="complete_bash", COMP_WORDS=line)
    os.environ["COMP_CWORD"] = str(line.count(" "))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main()
    answers.append(out.getvalue().split())
heavy = {"torch", "hydra", "omegaconf", "wandb"} & sys.modules.keys()
print(json.dumps({"answers": answers, "heavy": sorted(heavy)}))
"""


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> dict:
    place = tmp_path_factory.mktemp("completion")
    for file in ("first/run.json", "sweeps/s/sweep.jsonl"):
        (place / "runs" / file).parent.mkdir(parents=True)
        (place / "runs" / file).write_text("")
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        input=json.dumps([line for line, _, _ in LINES]),
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(LINES)), ids=[line for line, _, _ in LINES])
def test_what_a_shell_is_offered(offered: dict, number: int) -> None:
    _, wanted, unwanted = LINES[number]
    answer = set(offered["answers"][number])
    assert wanted <= answer
    assert not unwanted & answer


def test_completion_imports_nothing_heavy(offered: dict) -> None:
    assert offered["heavy"] == []


def test_the_script_that_a_shell_installs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlx"],
        env={**os.environ, "_VLX_COMPLETE": "source_zsh"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "#compdef vlx" in done.stdout
