"""What fewer tokens buy on this machine: GMACs, images/s, peak memory, accuracy, side by side."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.profiler import profile
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


class TokenCosts:
    """Protocol tokens@1: the reduced model and the plain one in turn, on random images.

    GMACs: torch's FLOP counter, one image, matrix products and convolutions. images/s: medians
    of alternating rounds after a warm-up of each, for every batch size of `eval.speed_batches`,
    with the weights and the precision of the run, the process's threads and device. Peak memory:
    of torch's tensors above what was held before, in one forward pass of the largest batch, from
    the allocator's own count (what oneDNN and BLAS hold for themselves is not in it).

    Untrained weights cost what trained ones do, so that of them the accuracy alone is measured.
    """

    name = "tokens"
    version = 1
    requires = (ReducedTokens,)
    needs_labels = False
    needs_captions = False

    @torch.no_grad()
    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        model = subject.get(ReducedTokens)
        side, device = model.image_size, data.device
        kinds = {"plain": model.plain, "reduced": model.reduced}
        found = Evaluation()

        def note(name: str, value: float, unit: str) -> None:
            found.metrics[name], found.units[name] = value, unit

        info = data.source("test").info
        found.split, found.num_samples = f"{info.name}/{info.split}", len(data.source("test"))
        for kind, forward in kinds.items():
            if kind == "reduced" or model.trained_plain:
                self._accuracy(forward, data, kind, note)
        if subject.weights == "untrained":
            return found
        for kind, forward in kinds.items():
            note(f"gmacs/{kind}", gmacs(forward, side, device), "GMACs/image")
        for size in data.cfg.speed_batches:
            images = torch.rand(size, 3, side, side, device=device)
            calls = [partial(forward, images) for forward in kinds.values()]
            seconds = alternate(calls, device)
            for kind, taken in zip(kinds, seconds):
                note(f"images-per-s-batch{size}/{kind}", size / taken, "images/s")
        if data.cfg.speed_batches:
            images = torch.rand(max(data.cfg.speed_batches), 3, side, side, device=device)
            for kind, forward in kinds.items():
                note(f"peak-memory/{kind}", peak_memory(partial(forward, images), device), "MiB")
        for where, counts in model.token_counts().items():
            found.lists[f"tokens-in-{where}"] = counts
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
    image = torch.rand(1, 3, side, side, device=device)
    forward(image)  # a reference model is built, and its map looked at, when it is first asked for
    # With gradients: without them the counter's hooks stumble over the view of a parameter that
    # attention pooling makes its queries of.
    with (
        torch.enable_grad(),
        FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops}) as counter,
    ):
        forward(image)
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


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """MiB of tensors that one call holds at most, above what is held already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes on the terminal
    with profile(profile_memory=True) as profiled:
        call()
    assert profiled is not None
    assert profiled.kineto_results is not None
    held = peak = 0
    # Every allocation (> 0) and release (< 0) of torch's allocator, temporaries of kernels too.
    events = profiled.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()  # type: ignore[attr-defined] - its stub leaves this out
        peak = max(peak, held)
    return peak / 2**20
