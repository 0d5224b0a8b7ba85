"""Several processes on gloo: the same numbers as one process with the same global batch."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.engine.compare import assert_close, final, tensors
from tests.engine.processes import (
    Kill,
    execute_world,
    finish,
    make_run,
    output,
    relaunch,
    start_world,
)
from vlx.core.results import read_results
from vlx.engine.rundir import read_record

pytestmark = pytest.mark.slow

OVERRIDES = (
    "train.steps=12", "train.checkpoint_every=4", "train.ema_decay=0.9", "optim.clip_norm=5.0",
    "train.batch_size=128", "schedule.warmup_steps=2", "data.workers=0",
)  # fmt: skip
# One process adds a batch's gradients in another order than two do, and fused AdamW, which sharded
# parameters cannot use, rounds otherwise. Twelve steps of fp32 (rounding 6e-8) carry this into the
# losses at about 1e-6, and into the state at about 1e-4 of a tensor's largest value.
LOSSES, STATE = 2e-5, 1e-3

Whole = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Uninterrupted runs, each made once."""
    folder = tmp_path_factory.mktemp("whole")
    made: dict[tuple, Path] = {}

    def run(world: int, strategy: str = "ddp", accumulate: int = 1) -> Path:
        key = (world, strategy, accumulate)
        if key not in made:
            words = [f"train.accumulate={accumulate}", f"launcher.strategy={strategy}"]
            name = "-".join(map(str, key))
            made[key] = make_run(folder, name, *OVERRIDES, "launcher=torchrun", *words)
            relaunch(made[key], launcher__processes=world)
            execute_world(made[key], world)
        return made[key]

    return run


def check_metrics(run_dir: Path, reference: Path) -> None:
    """Numbers of the evaluations: one sample of 360 may stand on the edge of a class."""
    found, expected = read_results(run_dir), read_results(reference)
    assert [m.name for m in found.metrics] == [m.name for m in expected.metrics]
    for own, other in zip(found.metrics, expected.metrics):
        assert own.num_samples == other.num_samples
        assert own.value == pytest.approx(other.value, abs=1 / 360 + 1e-9), own.name


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_like_one(whole: Whole, strategy: str, accumulate: int) -> None:
    one, two = whole(1, accumulate=accumulate), whole(2, strategy, accumulate)
    assert_close(two, one, losses=LOSSES, state=STATE)
    check_metrics(two, one)
    assert read_record(two).config_hash == read_record(one).config_hash


def test_two_processes_share_the_number_of_words(tmp_path: Path) -> None:
    """A mean over the words of all captions: processes hold different numbers of them."""
    words = ("train.steps=6", "eval.at_end=[]", "data.workers=0", "method.dropout=0")
    made = {}
    for world in (1, 2):
        made[world] = make_run(tmp_path, str(world), *words, "launcher=torchrun", slug="limber")
        relaunch(made[world], launcher__processes=world)
        execute_world(made[world], world)
    assert_close(made[2], made[1], losses=LOSSES, state=STATE)


@pytest.mark.parametrize(
    ("strategy", "worlds"),
    [("ddp", (2, 2)), ("fsdp", (2, 2)), ("fsdp", (2, 1)), ("fsdp", (1, 2))],
    ids=str,
)
def test_killed_run_resumes_on_as_many_or_other_processes(
    strategy: str, worlds: tuple[int, int], whole: Whole, tmp_path: Path
) -> None:
    words = (*OVERRIDES, "launcher=torchrun", f"launcher.strategy={strategy}")
    run_dir = make_run(tmp_path, "killed", *words, "eval.compare_untrained=false")
    first, second = worlds
    relaunch(run_dir, launcher__processes=first)
    processes = start_world(run_dir, first, kills={first - 1: Kill("step", 7)})
    codes = [finish(process, run_dir, code=None) for process in processes]
    assert codes[-1] == -signal.SIGKILL
    assert all(codes)
    relaunch(run_dir, launcher__processes=second)
    execute_world(run_dir, second)
    reference = whole(2, strategy)
    if worlds == (2, 2):  # nothing differs: not a bit may
        a, b = tensors(final(run_dir)), tensors(final(reference))
        assert all(a[name].equal(b[name]) for name in b)
    assert_close(run_dir, reference, losses=LOSSES, state=STATE)


def test_one_failing_process_ends_the_run_with_one_clear_line(cli: Cli, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "broken", *OVERRIDES, "launcher=torchrun")
    (run_dir / "log-rank1.txt").mkdir()  # process 1 cannot open its log; process 0 is fine
    done = cli("resume", str(run_dir), check=False)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert errors == [line for line in errors if line.startswith("error: process 1 failed: IsADir")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    record = read_record(run_dir)
    assert record.state == "failed"
    assert "process 1 failed" in record.message


def test_interrupted_together(tmp_path: Path) -> None:
    """A signal to one process stops all at the same step, saved."""
    run_dir = make_run(tmp_path, "stopped", *OVERRIDES, "launcher=torchrun")
    processes = start_world(run_dir, 2, kills={1: Kill("step", 6, signal.SIGTERM)})
    for process in processes:
        finish(process, run_dir, code=75)
    assert "vlx resume" in output(run_dir)
    record = read_record(run_dir)
    assert (record.state, record.step) == ("interrupted", final(run_dir).step)
