"""FIELD-NOTES section 4, tests 1 and 2: SIGKILL at any moment, then the same bits."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.engine.compare import assert_same_bits
from tests.engine.processes import Kill, execute, finish, make_run, relaunch, start
from vlx.core.results import read_results
from vlx.engine.rundir import read_record

pytestmark = pytest.mark.slow

# 5 steps an epoch: 13 steps end in the third epoch; saves fall within epochs and evaluations at
# their edges.
STEPS, EPOCH, SAVE_EVERY = 13, 5, 3
OVERRIDES = (
    "train.batch_size=256", f"train.steps={STEPS}", f"train.checkpoint_every={SAVE_EVERY}",
    "train.accumulate=4", "train.ema_decay=0.9", "optim.clip_norm=1.0", "data.resident=never",
    "data.workers=0", "eval.every_epochs=1", "eval.compare_untrained=false",
    "schedule.warmup_steps=4", "schedule.weight_decay_end=0.2", "eval.at_end=[knn]",
    "encoder.drop_path=0.2",  # draws from torch's global generator
)  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    run_dir = make_run(tmp_path_factory.mktemp("reference"), "whole", *OVERRIDES)
    execute(run_dir)
    return run_dir


def killed_and_resumed(folder: Path, *kills: Kill, overrides: tuple[str, ...] = ()) -> Path:
    run_dir = make_run(folder, "killed", *OVERRIDES, *overrides)
    for kill in kills:
        execute(run_dir, kill)
        assert not (run_dir / "results.json").exists()
    execute(run_dir)
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))
    return run_dir


RANDOM_STEPS = sorted(random.Random(0).sample(range(3, STEPS), 2))
CASES = {
    **{f"after step {n}": [Kill("step", n)] for n in RANDOM_STEPS},
    "before the first checkpoint": [Kill("step", 2)],
    "inside an accumulation window": [Kill("micro", 4 * 7 + 2)],
    "at an epoch's edge": [Kill("step", EPOCH)],
    "at the record of an evaluation": [Kill("log", EPOCH + 1)],
    "during an evaluation": [Kill("evaluate", 3)],
    "during the evaluation at the end": [Kill("evaluate", 6)],
    "while writing a checkpoint": [Kill("write", 8)],
    "while syncing a checkpoint": [Kill("sync", 9)],
    "before renaming a checkpoint": [Kill("rename", 3)],
    "before removing old checkpoints": [Kill("prune", 4)],
    "three times": [Kill("step", 4), Kill("micro", 4 * 2 + 1), Kill("write", 4)],
}


@pytest.mark.parametrize("kills", CASES.values(), ids=CASES.keys())
def test_killed_run_resumes_bit_for_bit(kills: list[Kill], reference: Path, tmp_path: Path) -> None:
    assert_same_bits(killed_and_resumed(tmp_path, *kills), reference)


@pytest.mark.parametrize("workers", [[2, 2], [0, 2], [2, 0]], ids=str)
def test_number_of_workers_may_change_on_resume(
    workers: list[int], reference: Path, tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path, "killed", *OVERRIDES, f"data.workers={workers[0]}")
    execute(run_dir, Kill("step", 7))
    relaunch(run_dir, data__workers=workers[1])
    execute(run_dir)
    assert_same_bits(run_dir, reference)


def test_resident_data_gives_the_same_bits(reference: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "killed", *OVERRIDES, "data.resident=always")
    execute(run_dir, Kill("step", 8))
    execute(run_dir)
    assert_same_bits(run_dir, reference)


def test_killed_from_outside_at_any_moment(reference: Path, tmp_path: Path) -> None:
    """The parent kills as soon as it sees a temporary checkpoint: between any two instructions."""
    run_dir = make_run(tmp_path, "killed", *OVERRIDES)
    process = start(run_dir)
    checkpoints = run_dir / "checkpoints"
    while process.is_alive() and not list(checkpoints.glob(".tmp-step-00000006*")):
        pass
    process.kill()
    finish(process, run_dir, code=-signal.SIGKILL)
    execute(run_dir)
    assert_same_bits(run_dir, reference)


def test_resume_by_the_command_line(reference: Path, tmp_path: Path, cli: Cli) -> None:
    run_dir = make_run(tmp_path, "killed", *OVERRIDES)
    execute(run_dir, Kill("step", 7))
    assert read_record(run_dir).state == "running"
    done = cli("resume", str(run_dir))
    assert "knn/top1" in done.stdout
    assert_same_bits(run_dir, reference)
    assert read_record(run_dir).state == "finished"
    assert "nothing to resume" in cli("resume", str(run_dir)).stdout
    assert read_results(run_dir).steps == STEPS
