"""Equality of two runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.processes import loss_records
from vlx.core.results import read_results
from vlx.engine import checkpoint


def final(run_dir: Path) -> checkpoint.Snapshot:
    found = checkpoint.latest(run_dir / "checkpoints")
    assert found is not None
    return checkpoint.load(found)


def tensors(snapshot: checkpoint.Snapshot) -> dict[str, Tensor]:
    """Weights, optimizer state and averages under one namespace."""
    parts = {"model": snapshot.model, "optimizer": snapshot.optimizer, "ema": snapshot.ema}
    parts["swad"] = snapshot.swad
    return {f"{part}:{name}": t for part, found in parts.items() for name, t in found.items()}


def assert_same_bits(run_dir: Path, reference: Path) -> None:
    """Losses, samples, rates, weights, optimizer, averages and metrics, bit for bit."""
    assert loss_records(run_dir) == loss_records(reference)
    own, other = final(run_dir), final(reference)
    assert own.step == other.step
    a, b = tensors(own), tensors(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} differ: {different[:3]}"
    values = [
        {(m.name, m.weights): m.value for m in read_results(run).metrics}
        for run in (run_dir, reference)
    ]
    assert values[0] == values[1]
    assert read_results(run_dir).weights_checksum == read_results(reference).weights_checksum


def assert_close(run_dir: Path, reference: Path, *, losses: float, state: float) -> None:
    """Same samples and rates; losses within a relative tolerance, state within one relative to
    each tensor's largest value."""
    own, other = loss_records(run_dir), loss_records(reference)
    for key in ("step", "train/sample_hash", "optim/lr", "optim/weight_decay"):
        assert [r[key] for r in own] == [r[key] for r in other], key
    for key in ("train/loss", "optim/grad_norm"):
        assert [r[key] for r in own] == pytest.approx([r[key] for r in other], rel=losses), key
    a, b = tensors(final(run_dir)), tensors(final(reference))
    assert a.keys() == b.keys()
    wrong = {}
    for name in a:
        assert a[name].shape == b[name].shape, name
        x, y = meaningful(name, a[name]), meaningful(name, b[name])
        error = float((x - y).abs().max() / y.abs().max().clamp(min=1e-12))
        if error > state:
            wrong[name] = error
    assert not wrong, wrong


def meaningful(name: str, tensor: Tensor) -> Tensor:
    """The part of a tensor whose gradient is more than rounding.

    A shift common to all keys leaves attention as it is, so the keys' part of a bias has the
    gradient 0; what it gets is noise, which Adam scales up to the learning rate.
    """
    if "key_value.bias" in name and tensor.ndim:
        return tensor.chunk(2)[1]
    if "qkv.bias" in name and tensor.ndim:
        queries, _, values = tensor.chunk(3)
        return torch.cat([queries, values])
    return tensor
