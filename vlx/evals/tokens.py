"""What fewer tokens buy on this machine: GMACs, images/s, peak memory, accuracy, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vlx.core.capability import ClassLogits, ReducedTokens
from vlx.evals.base import EvalData, Evaluation, Subject
from vlx.evals.classification import count_hits
from vlx.evals.pictures import grid, to_picture
from vlx.ops.patches import paint_groups

_ROUNDS = 7
_SECONDS = 6.0
"""Of measuring for one batch size; at least three rounds are measured whatever they take."""
_PICTURES = 6
_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class TokenCosts:
    """Protocol tokens@1: the reduced model and the plain one in turn, on random images.

    GMACs: torch's FLOP counter, one image, matrix products and convolutions. images/s: medians
    of alternating rounds after a warm-up of each, for every batch size of `eval.speed_batches`,
    with the weights and the precision of the run, the process's threads and device. Peak memory:
    above what was held before, of one forward pass of the largest batch (on a CPU by the process's
    high-water mark, where Linux lets it be reset).
    """

    name = "tokens"
    version = 1
    requires = (ReducedTokens,)
    needs_labels = False

    @torch.no_grad()
    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        model = subject.get(ReducedTokens)
        side, device = model.image_size, data.device
        kinds = {"plain": model.plain, "reduced": model.reduced}
        found = Evaluation()

        def note(name: str, value: float, unit: str) -> None:
            found.metrics[name], found.units[name] = value, unit

        for kind, forward in kinds.items():
            if kind == "reduced" or model.trained_plain:
                self._accuracy(forward, data, kind, note)
            note(f"gmacs/{kind}", gmacs(forward, side, device), "GMACs of one image")
        for size in data.cfg.speed_batches:
            images = torch.rand(size, 3, side, side, device=device)
            calls = [partial(forward, images) for forward in kinds.values()]
            seconds = alternate(calls, device)
            for kind, taken in zip(kinds, seconds):
                note(f"images-per-s-batch{size}/{kind}", size / taken, "images/s")
        if data.cfg.speed_batches:
            images = torch.rand(max(data.cfg.speed_batches), 3, side, side, device=device)
            for kind, forward in kinds.items():
                peak = peak_memory(partial(forward, images), device)
                if peak is not None:
                    note(f"peak-memory/{kind}", peak, "MiB")
        for where, counts in model.token_counts().items():
            found.lists[f"tokens-in-{where}"] = counts
        info = data.source("test").info
        found.split, found.num_samples = f"{info.name}/{info.split}", len(data.source("test"))
        found.pictures = self._pictures(model, data)
        return found

    @staticmethod
    def _accuracy(
        forward: Callable[[Tensor], Tensor],
        data: EvalData,
        kind: str,
        note: Callable[[str, float, str], None],
    ) -> None:
        info = data.source("test").info
        if not info.num_classes:
            return
        hits = count_hits(Forward(forward), data.pipeline("test"), info.num_classes)
        note(f"top1/{kind}", float(hits[:, 0].sum() / hits[:, 2].sum()), "share")

    @staticmethod
    def _pictures(model: ReducedTokens, data: EvalData) -> dict:
        images = torch.cat([batch["image"] for batch in data.sample("test", _PICTURES)])
        stages = model.groups(images)
        if not stages:
            return {}
        rows = []
        for index, image in enumerate(images):
            painted = [paint_groups(image, groups[index]) for _, groups in stages]
            rows.append([to_picture(x) for x in (image, *painted)])
        titles = [(0, "image"), *((n, title) for n, (title, _) in enumerate(stages, start=1))]
        return {"tokens": grid(rows, titles)}


class Forward(ClassLogits):
    """Any function to class logits as the capability."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward

    def class_logits(self, images: Tensor) -> Tensor:
        return self.forward(images)


def gmacs(forward: Callable[[Tensor], Tensor], side: int, device: torch.device) -> float:
    """1e9 multiply-accumulates of one image, what the reducer multiplies included."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops}) as counter:
        forward(torch.rand(1, 3, side, side, device=device))
    return counter.get_total_flops() / 2e9


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    """Of the CPU's fused attention, which torch's counter leaves out."""
    return sdpa_flop_count(query, key, value)


def alternate(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Median seconds of each call, measured in turn so that a busy moment hits all alike."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    started = time.perf_counter()
    for round_number in range(_ROUNDS):
        for times, call in zip(taken, calls):
            synchronise(device)
            before = time.perf_counter()
            call()
            synchronise(device)
            times.append(time.perf_counter() - before)
        if round_number >= 2 and time.perf_counter() - started > _SECONDS:
            break
    return [statistics.median(times) for times in taken]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB that one call needs above what is held already; None where it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        _CLEAR_PEAK.write_text("5")  # Linux: reset VmHWM to what is resident now
        before = _resident("VmRSS")
        call()
        return (_resident("VmHWM") - before) / 1024
    except (OSError, ValueError):
        return None


def _resident(field: str) -> float:
    """A field of /proc/self/status, in KiB."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1])
    raise ValueError(field)
