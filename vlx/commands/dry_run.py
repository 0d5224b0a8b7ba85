"""`--dry-run`: sizes and costs of a run from shapes alone, without data or memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlx.core import registry
from vlx.core.fields import Batch, Needs
from vlx.core.method import StepContext, Trainable
from vlx.encoders.build import EncoderBuilder
from vlx.engine.config import Optimizer, RunConfig

_COUNTED_BATCH = 2
_OPTIMIZER_COPIES = {Optimizer.adamw: 2, Optimizer.lamb: 2, Optimizer.sgd: 1, Optimizer.lars: 1}


@dataclass
class DryRun:
    """What a run will cost."""

    total_params: int
    trainable_params: int
    gmacs: float
    """Multiply-accumulates of one forward step of one sample, in 1e9."""
    activation_bytes: int
    """Tensors that one sample's forward keeps for the backward pass."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """Tokens that each block of every list of blocks runs on, in the order they ran."""


def measure(cfg: RunConfig, num_classes: int = 1000) -> DryRun:
    """Build the method on the meta device and run one step of shapes through it."""
    cls = registry.load(cfg.slug)
    assert issubclass(cls, Trainable)
    roles = {"encoder": cfg.encoder, "teacher": cfg.teacher}
    with torch.device("meta"):
        method = cls(cfg.method, EncoderBuilder(roles, num_classes, load_weights=False))
        batch = meta_batch(cls.needs(cfg.method), cfg.encoder.image_size, _COUNTED_BATCH)
        ctx = StepContext(step=0, total_steps=1, steps_per_epoch=1, seed=0)
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            if not isinstance(tensor, nn.Parameter):
                saved += tensor.numel() * tensor.element_size()
            return tensor

        with (
            _count_tokens(method) as tokens,
            FlopCounterMode(display=False) as flops,
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        ):
            method.step(batch, ctx)
    params = list(method.parameters())
    return DryRun(
        total_params=sum(p.numel() for p in params),
        trainable_params=sum(p.numel() for p in params if p.requires_grad),
        gmacs=flops.get_total_flops() / 2 / _COUNTED_BATCH / 1e9,
        activation_bytes=saved // _COUNTED_BATCH,
        tokens=tokens,
    )


def memory_bytes(report: DryRun, cfg: RunConfig, processes: int = 1) -> int:
    """An estimate of one process's memory: weights, gradients, optimizer state, activations."""
    copies = 2 + _OPTIMIZER_COPIES[cfg.optim.name] + (cfg.train.ema_decay is not None)
    micro = cfg.train.batch_size // (processes * cfg.train.accumulate)
    weights = report.trainable_params * 4 * copies
    frozen = (report.total_params - report.trainable_params) * 4
    return weights + frozen + report.activation_bytes * micro


def meta_batch(needs: Needs, size: int, batch_size: int) -> Batch:
    """Tensors of the right shapes on the current device, without content."""
    batch: Batch = {"sample_id": torch.empty(batch_size, dtype=torch.int64)}
    for view in needs.views:
        if view.keep:
            side = view.size or size
            batch[view.name] = torch.empty(batch_size, 3, side, side)
    for wanted in needs.fields:
        batch[wanted.name] = torch.empty(batch_size, dtype=wanted.dtype)
    return batch


@contextmanager
def _count_tokens(method: nn.Module) -> Iterator[dict[str, list[int]]]:
    tokens: dict[str, list[int]] = {}
    handles = []
    for name, part in method.named_modules():
        if name.rsplit(".", 1)[-1] != "blocks" or not isinstance(
            part, nn.Sequential | nn.ModuleList
        ):
            continue
        for block in part:

            def record(_: nn.Module, args: tuple, where: str = name) -> None:
                tokens.setdefault(where, []).append(args[0].shape[1])

            handles.append(block.register_forward_pre_hook(record))
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()
