"""Losses that compare pairs, over processes, cached micro-batches, and a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.compare import assert_close, assert_same_bits
from tests.engine.inprocess import interrupt, run_here
from tests.engine.processes import execute_world, make_run, relaunch

OVERRIDES = (
    "train.steps=6", "train.batch_size=32", "data.workers=0", "eval.at_end=[]",
    'data.variant="faces=DejaVuSans"', "train.checkpoint_every=2",
)  # fmt: skip
# As in test_parallel: sums in another order.
LOSSES, STATE = 2e-5, 1e-3


def made(
    folder: Path, slug: str, *, world: int = 1, accumulate: int = 1, strategy: str = "ddp"
) -> Path:
    name = f"{slug}-{world}-{accumulate}-{strategy}"
    words = [f"train.accumulate={accumulate}", "launcher=torchrun", f"launcher.strategy={strategy}"]
    run = make_run(folder, name, *OVERRIDES, *words, slug=slug)
    relaunch(run, launcher__processes=world)
    execute_world(run, world)
    return run


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("one"), "clip")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "accumulate", "strategy"),
    [(2, 1, "ddp"), (1, 2, "ddp"), (2, 2, "ddp"), (2, 1, "fsdp"), (2, 2, "fsdp")],
)
def test_clips_split_batch_trains_like_the_whole_one(
    tmp_path: Path, one: Path, world: int, accumulate: int, strategy: str
) -> None:
    split = made(tmp_path, "clip", world=world, accumulate=accumulate, strategy=strategy)
    assert_close(split, one, losses=LOSSES, state=STATE)


@pytest.mark.slow
def test_lightclips_two_processes_train_like_one(tmp_path: Path) -> None:
    runs = [made(tmp_path, "lightclip", world=world) for world in (2, 1)]
    assert_close(*runs, losses=LOSSES, state=STATE)


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["albef", "unimodal-projectors", "limber"])
def test_sharded_weights_train_like_whole_ones(tmp_path: Path, slug: str) -> None:
    """ALBEF: its teacher, sharded too, follows its student."""
    runs = [made(tmp_path, slug, world=2, strategy=strategy) for strategy in ("fsdp", "ddp")]
    assert_close(*runs, losses=LOSSES, state=STATE)


@pytest.mark.parametrize("slug", ["clip", "albef"])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, slug: str) -> None:
    """ALBEF: queue and momentum weights are in the checkpoint; the tokenizer is the run's own."""
    whole, cut = (make_run(tmp_path, name, *OVERRIDES, slug=slug) for name in ("whole", "cut"))
    assert run_here(whole)[0] == 0
    interrupt(cut, 3)
    assert run_here(cut)[0] == 0
    assert_same_bits(cut, whole)
    assert (cut / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


def test_a_scalar_that_fsdp_cannot_shard_is_refused_by_name() -> None:
    from vlx.core.errors import ConfigError
    from vlx.engine.parallel import check_shardable

    method = torch.nn.Module()
    method.gate = torch.nn.Parameter(torch.zeros(1))
    check_shardable(method)
    method.gate = torch.nn.Parameter(torch.tensor(0.0))
    with pytest.raises(ConfigError, match=r"cannot shard the scalar gate: use .*ddp"):
        check_shardable(method)
