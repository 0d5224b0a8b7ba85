"""The loop: accumulation, precision, compilation, determinism, the best checkpoint."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.engine.compare import assert_close, assert_same_bits, final
from tests.engine.inprocess import run_here, stop_after
from tests.engine.processes import loss_records, make_run
from vlx.core.errors import ConfigError
from vlx.engine.load import run_config
from vlx.engine.parallel import Parallel
from vlx.engine.record import StepRecord, sample_hash
from vlx.engine.rundir import read_record
from vlx.track.jsonl import read_metrics

QUICK = ("train.steps=6", "eval.at_end=[]", "data.workers=0", "train.ema_decay=0.9")


def run(folder: Path, name: str, *words: str) -> Path:
    run_dir = make_run(folder, name, *QUICK, *words)
    assert run_here(run_dir)[0] == 0
    return run_dir


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_steps_equal_one_big_batch(accumulate: int, tmp_path: Path) -> None:
    """MAE's loss is a mean over samples with equal counts: only the order of adding differs."""
    whole = run(tmp_path, "whole", "optim.clip_norm=1.0")
    parts = run(tmp_path, "parts", "optim.clip_norm=1.0", f"train.accumulate={accumulate}")
    assert_close(parts, whole, losses=1e-5, state=1e-3)


def test_evaluation_mode_leaves_statistics_and_depth_alone_and_trains_the_rest(
    tmp_path: Path,
) -> None:
    words = ("train.steps=4", "eval.every_steps=2", "eval.at_end=[]", "encoder.drop_path=0.5")

    def trained(name: str, *more: str) -> dict[str, torch.Tensor]:
        run_dir = make_run(tmp_path, name, *words, *more, slug="rmt")
        assert run_here(run_dir)[0] == 0
        return final(run_dir).model

    plain, still = trained("plain"), trained("still", "train.evaluation_mode=true")
    means = [name for name in plain if name.endswith("running_mean")]
    assert means
    assert all(plain[name].any() and not still[name].any() for name in means)
    # Two runs differ by the depth that is dropped; without it nothing is random.
    again = trained("again", "train.evaluation_mode=true", "encoder.drop_path=0.0")
    assert all(torch.equal(again[name], still[name]) for name in still)


def test_same_seed_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    first, second = run(tmp_path, "first"), run(tmp_path, "second")
    assert loss_records(first) == loss_records(second)
    assert all(t.equal(final(second).model[n]) for n, t in final(first).model.items())
    third = run(tmp_path, "third", "seed=1")
    assert loss_records(first)[0]["train/loss"] != loss_records(third)[0]["train/loss"]
    assert (
        loss_records(first)[0]["train/sample_hash"] != loss_records(third)[0]["train/sample_hash"]
    )


@pytest.mark.slow
def test_processes_and_hash_seeds_do_not_matter(tmp_path: Path) -> None:
    here = run(tmp_path, "here")
    code = "import sys; from pathlib import Path; from vlx.engine.run import execute; "
    code += "sys.exit(execute(Path(sys.argv[1])))"
    for hash_seed in ("1", "2"):
        run_dir = make_run(tmp_path, f"hash{hash_seed}", *QUICK)
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", code, str(run_dir)], cwd=ROOT, env=env, check=True)
        assert loss_records(run_dir) == loss_records(here)
        assert all(t.equal(final(here).model[n]) for n, t in final(run_dir).model.items())


def test_interrupted_in_process_run_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path, "whole")
    run_dir = make_run(tmp_path, "stopped", *QUICK)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        code, printed = run_here(run_dir)
    assert code == 75
    assert f"vlx resume {run_dir}" in printed
    run_here(run_dir)
    assert_same_bits(run_dir, whole)


def test_bf16_runs_and_stays_near_fp32(tmp_path: Path) -> None:
    whole, half = run(tmp_path, "fp32"), run(tmp_path, "bf16", "train.precision=bf16")
    for own, other in zip(loss_records(half), loss_records(whole)):
        assert math.isfinite(own["train/loss"])
        # bf16 keeps 8 bits of a product: 0.4% each, less in a mean over thousands.
        assert own["train/loss"] == pytest.approx(other["train/loss"], rel=0.02)
    assert all(t.dtype is torch.float32 for t in final(half).model.values())


def test_deterministic_mode_is_strict_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, strict = run(tmp_path, "whole"), run(tmp_path, "strict", "train.deterministic=true")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert loss_records(strict) == loss_records(whole)
    run(tmp_path, "back")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_compiled_run_matches_eager(tmp_path: Path) -> None:
    """One block: most of this test's time is the C++ compiler's."""
    small = ("encoder.depth=1", "method.decoder_depth=0", "train.steps=2")
    eager = run(tmp_path, "eager", *small)
    compiled = run(tmp_path, "compiled", *small, "train.compile=true")
    # Fused kernels round once where eager ones round several times.
    assert_close(compiled, eager, losses=1e-5, state=1e-3)
    assert final(compiled).model.keys() == final(eager).model.keys()


@pytest.mark.slow
def test_compiled_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and differentiated by the compiler, run by eager kernels: the same bits."""
    capture = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", capture)
    whole = run(tmp_path, "whole", "train.compile=true")
    run_dir = make_run(tmp_path, "stopped", *QUICK, "train.compile=true")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run_here(run_dir)[0] == 75
    assert run_here(run_dir)[0] == 0
    assert_same_bits(run_dir, whole)


def test_gpu_only_settings_are_refused_without_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for words, match in (
        ({"device": "cuda"}, "torch sees no GPU"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
    ):
        cfg = run_config({"slug": "mae", "train": words})
        with pytest.raises(ConfigError, match=match):
            Parallel(cfg.train, cfg.launcher)


@pytest.mark.parametrize("sign", ["", "-"])
def test_best_checkpoint_is_kept_beside_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    from vlx.engine.run import Run

    expected = [0.1, 0.9, 0.5, 0.4] if sign == "" else [0.9, 0.1, 0.5, 0.4]
    scores = iter(expected)
    monkeypatch.setattr(Run, "_evaluate_during", lambda self, step: {"knn/top1": next(scores)})
    run_dir = make_run(
        tmp_path, "best", *QUICK, "train.batch_size=512", "train.steps=8", "eval.every_epochs=1",
        f"train.keep_best={sign}knn/top1", "train.keep_last=1", "train.checkpoint_every=100",
    )  # fmt: skip
    run_here(run_dir)
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000008"]  # two steps an epoch; the second was best
    values = [r["eval/knn/top1"] for r in read_metrics(run_dir / "metrics.jsonl") if len(r) == 3]
    assert values == expected


def test_unknown_best_metric_is_named(tmp_path: Path) -> None:
    words = ("train.batch_size=512", "eval.every_epochs=1", "train.keep_best=knn/top")
    run_dir = make_run(tmp_path, "typo", *QUICK, *words)
    with pytest.raises(ConfigError, match=r"train.keep_best=knn/top: .*knn/top1"):
        run_here(run_dir)


def test_unexpected_error_is_recorded_and_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlx.methods.mae import Mae

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Mae, "step", broken)
    run_dir = make_run(tmp_path, "bug", *QUICK)
    with pytest.raises(ZeroDivisionError):
        run_here(run_dir)
    record = read_record(run_dir)
    assert (record.state, record.message) == ("failed", "ZeroDivisionError: a bug")


def test_wall_time_adds_up_over_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path, "stopped", *QUICK)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run_here(run_dir)
    first = final(run_dir).state["progress"]["seconds"]
    run_here(run_dir)
    assert 0 < first < final(run_dir).state["progress"]["seconds"]


def test_sample_hash_does_not_depend_on_the_split() -> None:
    """16 samples as 1 x 1 x 16, 1 x 2 x 8 and, two processes, 2 x 2 x 4."""
    order = torch.arange(16)
    by_two = order.view(2, 2, 4).transpose(0, 1)  # micro-batches first in the global batch
    expected = sample_hash(order.view(1, 1, 16))
    assert sample_hash(order.view(1, 2, 8)) == expected
    assert sample_hash(by_two) == expected
    assert sample_hash(order.flip(0).view(1, 1, 16)) != expected


def test_record_means_over_the_micro_batches_that_report() -> None:
    record = StepRecord()
    ids = torch.arange(2)
    record.add(ids, {"a": torch.tensor(1.0)}, {"m": torch.tensor(4.0)})
    record.add(ids, {"a": torch.tensor(3.0)}, {})
    assert record.mean_losses() == {"a": torch.tensor(2.0)}
    assert record.mean_metrics() == {"m": torch.tensor(4.0)}
    assert record.is_finite(gradients=True)
    record.grad_norm = torch.tensor(math.nan)
    assert not record.is_finite(gradients=True)
    assert record.is_finite(gradients=False)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_captions_equal_one_big_batch(accumulate: int, tmp_path: Path) -> None:
    """Micro-batches hold different numbers of words: the loss divides by those of all."""

    def limber(name: str, *words: str) -> Path:
        run_dir = make_run(tmp_path, name, *QUICK, "method.dropout=0", *words, slug="limber")
        assert run_here(run_dir)[0] == 0
        return run_dir

    whole = limber("whole")
    parts = limber("parts", f"train.accumulate={accumulate}")
    assert_close(parts, whole, losses=1e-5, state=1e-3)
