"""Protocol tokens@1: memory counted exactly, accuracy alone of untrained weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlx.core.capability import ReducedTokens
from vlx.data.config import DataConfig
from vlx.engine.evaluate import Outcome, run_evaluators
from vlx.evals.base import EvalData, Subject
from vlx.evals.config import EvalConfig
from vlx.evals.tokens import gmacs, peak_memory

CPU = torch.device("cpu")


def three_tensors() -> None:
    """4 and 2 MiB at once, then 1 MiB beside the 2."""
    first, second = torch.empty(1024, 1024), torch.empty(512, 1024)
    del first
    third = torch.empty(256, 1024)
    assert second.numel() + third.numel()


def a_temporary() -> Tensor:
    """4 MiB, its product of 4 and the softmax of that in 4 more; only the last is left."""
    square = torch.rand(1024, 1024)
    return (square @ square).softmax(-1)


@pytest.mark.parametrize(
    ("call", "mebibytes"),
    [(three_tensors, 6.0), (a_temporary, 12.0), (int, 0.0)],
)
def test_peak_memory_is_counted_to_the_byte(call: Callable, mebibytes: float) -> None:
    assert peak_memory(call, CPU) == mebibytes


def test_buffers_inside_a_kernel_count_too() -> None:
    turned = torch.ones(1024, 1024).t()
    assert peak_memory(turned.contiguous, CPU) > 4  # the copy goes through a tile of some KiB


def test_what_is_held_already_does_not_count() -> None:
    held = torch.rand(2048, 2048)
    assert peak_memory(lambda: held.add_(1), CPU) == pytest.approx(0, abs=1e-3)
    kept = []
    assert peak_memory(lambda: kept.append(held[:512] + 1), CPU) == pytest.approx(4, abs=1e-3)


class Halved(ReducedTokens):
    """One matrix product, and half of it."""

    image_size = 8

    def __init__(self, trained_plain: bool = True) -> None:
        self.trained_plain = trained_plain
        self.weight = torch.rand(3 * 64, 10)

    def reduced(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :96] @ self.weight[:96]

    def plain(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight

    def token_counts(self) -> dict[str, list[int]]:
        return {"mlp": [4, 2]}

    def groups(self, images: Tensor) -> list[tuple[str, Tensor]]:
        return []


def evaluate(subject: ReducedTokens, weights: str) -> Outcome:
    cfg = EvalConfig(speed_batches=[2, 4])
    data = EvalData(DataConfig(workers=0), cfg, image_size=8, device=CPU)
    return run_evaluators(
        ["tokens"], Subject("halved", (subject,)), data, weights=weights, pictures_dir=None
    )


def test_gmacs_are_those_of_the_products() -> None:
    assert gmacs(Halved().plain, 8, CPU) == 192 * 10 / 1e9
    assert gmacs(Halved().reduced, 8, CPU) == 96 * 10 / 1e9


def test_both_sides_of_every_quantity_with_units() -> None:
    outcome = evaluate(Halved(), "trained")
    units = {metric.name: metric.unit for metric in outcome.metrics}
    for what, unit in {
        "top1": "share", "gmacs": "GMACs/image", "peak-memory": "MiB",
        "images-per-s-batch2": "images/s", "images-per-s-batch4": "images/s",
    }.items():  # fmt: skip
        for kind in ("plain", "reduced"):
            assert units.pop(f"tokens/{what}/{kind}") == unit
    assert units == {}
    assert outcome.counts == {"tokens/tokens-in-mlp": [4, 2]}
    assert {metric.protocol for metric in outcome.metrics} == {"tokens@1"}


def test_of_untrained_weights_accuracy_alone_is_measured() -> None:
    outcome = evaluate(Halved(), "untrained")
    assert {m.name for m in outcome.metrics} == {"tokens/top1/plain", "tokens/top1/reduced"}
    assert outcome.counts == {}
    trained = {m.name: m.value for m in evaluate(Halved(), "ema").metrics}
    assert len(trained) > 2


def test_a_reference_of_other_weights_has_costs_and_no_accuracy() -> None:
    names = {metric.name for metric in evaluate(Halved(trained_plain=False), "trained").metrics}
    assert "tokens/top1/plain" not in names
    assert {"tokens/top1/reduced", "tokens/gmacs/plain"} <= names
