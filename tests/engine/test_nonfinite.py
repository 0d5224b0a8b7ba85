"""FIELD-NOTES section 4, test 6: a loss that is not finite, its evidence and its replay."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.engine.inprocess import interrupt, run_here
from tests.engine.processes import finish, make_run, start_world
from vlx.commands.replay import replay_run
from vlx.core.errors import EXIT_DIVERGED, DivergedError, VlxError
from vlx.engine import checkpoint
from vlx.engine.loop import Trainer
from vlx.engine.nonfinite import evidence_folders, read_evidence
from vlx.engine.rundir import read_record

# A rate so high that the second step's activations overflow: a real divergence.
DIVERGES = (
    "optim.lr=1e20", "optim.weight_decay=0", "schedule=constant", "train.checkpoint_every=1",
    "train.keep_last=100", "train.steps=20", "train.max_skipped_steps=3", "eval.at_end=[]",
    "train.ema_decay=0.9", "data.workers=0",
)  # fmt: skip


def states(run_dir: Path) -> list[checkpoint.Snapshot]:
    return [checkpoint.load(path) for path in checkpoint.complete(run_dir / "checkpoints")]


def test_run_stops_with_evidence_and_the_weights_are_left_alone(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run", *DIVERGES)
    with pytest.raises(DivergedError, match="4 steps in a row") as caught:
        run_here(run_dir)
    assert caught.value.exit_code == EXIT_DIVERGED == 3
    assert "\n" not in str(caught.value)
    assert "vlx replay" in str(caught.value)
    saved = states(run_dir)
    skipped = [snapshot.state["progress"]["skipped"] for snapshot in saved]
    first = skipped.index(1)
    assert skipped[first:] == [1, 2, 3]
    before = saved[first - 1]
    for snapshot in saved[first:]:
        for part in ("model", "optimizer", "ema"):
            own, expected = getattr(snapshot, part), getattr(before, part)
            assert all(own[name].equal(expected[name]) for name in expected), part
    (folder,) = evidence_folders(run_dir)
    evidence = read_evidence(folder)
    assert evidence.step == first + 3
    assert len(evidence.sample_ids[0][0]) == 64
    snapshot = checkpoint.load(checkpoint.complete(folder)[0])
    assert all(snapshot.model[name].equal(before.model[name]) for name in before.model)
    record = read_record(run_dir)
    assert record.state == "failed"
    assert "not finite" in record.message


def test_counter_survives_a_resume(tmp_path: Path) -> None:
    """Steps 2 and 3 are left out, the run is stopped, and two more end it: not four."""
    run_dir = make_run(tmp_path, "run", *DIVERGES)
    interrupt(run_dir, 3)
    assert states(run_dir)[-1].state["progress"]["skipped"] == 2
    with pytest.raises(DivergedError, match="step 5: not finite for 4 steps in a row"):
        run_here(run_dir)


def test_a_single_bad_step_is_left_out_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path, "run", "eval.at_end=[]", "train.steps=4", "data.workers=0")
    original = Trainer._gradients

    def gradients(self: Trainer, step: int, *args):
        record = original(self, step, *args)
        if step == 1:
            record.grad_norm = torch.tensor(math.inf)  # a gradient that is not finite
        return record

    monkeypatch.setattr(Trainer, "_gradients", gradients)
    applied = []
    original_apply = Trainer._apply
    monkeypatch.setattr(
        Trainer, "_apply", lambda self, step: (applied.append(step), original_apply(self, step))
    )
    assert run_here(run_dir)[0] == 0
    assert applied == [0, 2, 3]
    assert not evidence_folders(run_dir)


def test_replay_computes_the_same_losses(tmp_path: Path) -> None:
    """Not finite in the run, not finite again; and where the losses are finite, the same bits."""
    run_dir = make_run(tmp_path, "run", *DIVERGES, "train.accumulate=2")
    with pytest.raises(DivergedError):
        run_here(run_dir)
    found = replay_run(run_dir, Console(quiet=True))
    evidence = found.evidence
    assert [row.sample_ids for row in found.micro_batches] == evidence.sample_ids[0]
    mean = sum(row.losses["recon"] for row in found.micro_batches) / 2
    assert not math.isfinite(evidence.losses["recon"])
    assert not math.isfinite(mean)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_replay_of_two_processes_on_one_gives_the_logged_loss(
    accumulate: int, tmp_path: Path
) -> None:
    """A step called bad whose numbers are finite, so that they can be compared."""
    words = ("train.max_skipped_steps=0", f"train.accumulate={accumulate}", "launcher=torchrun")
    run_dir = make_run(tmp_path, "run", *words, "eval.at_end=[]", "data.workers=0")
    for process in start_world(run_dir, 2, before=_call_the_third_step_bad):
        finish(process, run_dir, code=EXIT_DIVERGED)
    found = replay_run(run_dir, Console(quiet=True))
    assert found.evidence.step == 2
    assert [(row.rank, row.micro) for row in found.micro_batches] == [
        (rank, micro) for rank in range(2) for micro in range(accumulate)
    ]
    assert [row.sample_ids for row in found.micro_batches] == [
        ids for own in found.evidence.sample_ids for ids in own
    ]
    # The mean over micro-batches and processes is added up in another order.
    losses = [row.losses["recon"] for row in found.micro_batches]
    mean = sum(losses) / len(losses)
    assert mean == pytest.approx(found.evidence.losses["recon"], rel=1e-6)
    assert found.grad_norm == pytest.approx(found.evidence.grad_norm, rel=1e-5)


def _call_the_third_step_bad() -> None:
    from vlx.engine.record import StepRecord

    original, calls = StepRecord.is_finite, 0

    def is_finite(self: StepRecord, *, gradients: bool) -> bool:
        nonlocal calls
        calls += 1
        return original(self, gradients=gradients) and calls != 3

    StepRecord.is_finite = is_finite  # type: ignore[method-assign]


def test_replay_of_a_sound_run_says_so(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run")
    with pytest.raises(VlxError, match="has no step whose loss"):
        replay_run(run_dir, Console(quiet=True))


def test_command_prints_the_step_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from vlx import cli

    # The module's console keeps the width of whenever it was first imported.
    monkeypatch.setattr(cli, "console", Console(width=160))
    run_dir = make_run(tmp_path, "run", *DIVERGES)
    with pytest.raises(DivergedError):
        run_here(run_dir)
    done = CliRunner().invoke(cli.app, ["replay", str(run_dir)])
    assert done.exit_code == 0, done.output
    assert "recon nan" in done.output
    assert "and 58 more" in done.output
