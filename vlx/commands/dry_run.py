"""`--dry-run`: sizes and costs of a run from shapes alone, without data or memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlx.commands.tables import shorten
from vlx.config.compose import to_yaml
from vlx.core import registry
from vlx.core.capability import DualEncoder, ImageFeatures, ReducedTokens
from vlx.core.errors import DataError
from vlx.core.fields import Batch, Needs
from vlx.core.method import Method, Trainable
from vlx.core.plain import plain_lines
from vlx.core.step import StepContext
from vlx.data.open import open_source
from vlx.data.shards import not_fetched
from vlx.engine.build import SOME_CLASSES, builder_of
from vlx.engine.config import Optimizer, RunConfig
from vlx.engine.evaluate_encoder import build_subject
from vlx.engine.load import from_dict, run_config
from vlx.engine.optim import peak_lr
from vlx.engine.run import total_steps
from vlx.engine.text import shape_tokenizer
from vlx.evals.tokens import gmacs

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
    reduced_gmacs: float | None = None
    """Of one image with reduced tokens, for methods that reduce them; then `tokens` are these."""


def measure(cfg: RunConfig, num_classes: int = 1000) -> DryRun:
    """Build the method on the meta device and run one step of shapes through it."""
    cls = registry.load(cfg.slug)
    assert issubclass(cls, Trainable)
    tokenizer = shape_tokenizer(cfg.text)
    with torch.device("meta"):
        method = cls(cfg.method, builder_of(cfg, num_classes, tokenizer, load_weights=False))
        # Before the step: schedules of training may start from all tokens.
        reduced = _reduced(method, cfg.encoder.image_size)
        method.train()
        length = cfg.text.context_length if cfg.text else 0
        batch = meta_batch(cls.needs(cfg.method), cfg.encoder.image_size, _COUNTED_BATCH, length)
        ctx = StepContext(step=0, total_steps=1, steps_per_epoch=1, seed=0)
        saved: dict[int, Tensor] = {}  # by storage: several operations may keep the same one

        def count(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                saved[tensor.untyped_storage()._cdata] = tensor
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
        activation_bytes=sum(t.untyped_storage().nbytes() for t in saved.values())
        // _COUNTED_BATCH,
        tokens=reduced[1] if reduced else tokens,
        reduced_gmacs=reduced[0] if reduced else None,
    )


def _reduced(method: Method, size: int) -> tuple[float, dict[str, list[int]]] | None:
    """GMACs and tokens by layer of one image, where the method reduces tokens; on meta."""
    found = [part for part in method.exports() if isinstance(part, ReducedTokens)]
    if not found:
        return None
    method.eval()
    with torch.no_grad():
        cost = gmacs(found[0].reduced, size, torch.device("meta"))
    return cost, found[0].token_counts()


def measure_evaluation(cfg: RunConfig) -> DryRun:
    """The same of `vlx eval`: one image through the encoder, nothing kept for a backward pass."""
    with torch.device("meta"), torch.no_grad():
        subject, module = build_subject(cfg, SOME_CLASSES, load_weights=False)
        size = cfg.encoder.image_size
        images = torch.empty(_COUNTED_BATCH, 3, size, size)
        # As in `gmacs`: the counter wants gradients, which cost nothing on meta.
        with (
            torch.enable_grad(),
            _count_tokens(module) as tokens,
            FlopCounterMode(display=False) as flops,
        ):
            if subject.has(DualEncoder):
                subject.get(DualEncoder).joint_image_features(images)
            else:
                subject.get(ImageFeatures).image_features(images)
    return DryRun(
        total_params=sum(p.numel() for p in module.parameters()),
        trainable_params=0,
        gmacs=flops.get_total_flops() / 2 / _COUNTED_BATCH / 1e9,
        activation_bytes=0,
        tokens=tokens,
    )


def memory_bytes(report: DryRun, cfg: RunConfig, processes: int = 1) -> int:
    """An estimate of one process's memory: weights, gradients, optimizer state, activations."""
    averages = cfg.train.ema_decay is not None or cfg.train.swad is not None
    copies = 2 + _OPTIMIZER_COPIES[cfg.optim.name] + averages
    micro = cfg.train.batch_size // (processes * cfg.train.accumulate)
    weights = report.trainable_params * 4 * copies
    frozen = (report.total_params - report.trainable_params) * 4
    return weights + frozen + report.activation_bytes * micro


def meta_batch(needs: Needs, size: int, batch_size: int, context_length: int = 0) -> Batch:
    """Tensors of the right shapes on the current device, without content."""
    batch: Batch = {"sample_id": torch.empty(batch_size, dtype=torch.int64)}
    for view in needs.views:
        if view.keep:
            side = view.size or size
            batch[view.name] = torch.empty(batch_size, 3, side, side)
    for wanted in needs.fields:
        shape = [{"B": batch_size, "L": context_length}[axis] for axis in wanted.layout.split()]
        batch[wanted.name] = torch.empty(shape, dtype=wanted.dtype)
    return batch


def print_dry_run(config: dict[str, Any], console: Console) -> None:
    """What a run of this resolved config will be. Builds on the meta device, writes nothing."""
    evaluation = config["method"] is None
    cfg = from_dict(RunConfig, config) if evaluation else run_config(config)
    steps, classes = ("none: no training", 0) if evaluation else _steps(cfg)
    report = measure_evaluation(cfg) if evaluation else measure(cfg, classes or SOME_CLASSES)
    table = Table(title=f"{cfg.command} {cfg.slug}, preset {cfg.preset}", show_header=False)
    table.add_row("parameters", f"{report.total_params:,} total")
    table.add_row("", f"{report.trainable_params:,} trainable")
    what = "of one image" if evaluation else "of one sample's training forward"
    table.add_row("GMACs", f"{report.gmacs:.3f} {what}")
    if report.reduced_gmacs is not None:
        table.add_row("", f"{report.reduced_gmacs:.3f} of one image, tokens reduced")
    for where, counts in report.tokens.items():
        table.add_row(f"tokens in {where}", shorten(counts))
    if not evaluation:
        processes = cfg.launcher.processes * cfg.launcher.nodes
        memory = memory_bytes(report, cfg, processes) / 2**30
        table.add_row("memory", f"about {memory:.2f} GiB a process, {processes} of them (fp32)")
        table.add_row("steps", steps)
        table.add_row("learning rate", _learning_rate(cfg))
    console.print(table)
    console.print(Text(plain_lines(to_yaml(config))), soft_wrap=True, end="")


def _steps(cfg: RunConfig) -> tuple[str, int]:
    """(the run's length in words, classes of the data); 0 classes where the data is not here."""
    try:
        missing = not_fetched(cfg.data)
        if missing:
            raise DataError(f"{missing[0]} is not fetched in a dry run")
        source = open_source(cfg.data, cfg.data.train_split)
    except Exception as error:  # a dry run needs no data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if cfg.train.steps is not None:
            return f"{cfg.train.steps:,}", 0
        return f"unknown, {cfg.train.epochs:g} epochs: {reason}", 0
    classes = source.info.num_classes
    per_epoch = len(source) // cfg.train.batch_size
    if cfg.train.steps is None and per_epoch == 0:
        size = f"train.batch_size={cfg.train.batch_size}"
        return f"unknown: {size} is larger than the {len(source)} samples of the data", classes
    total = total_steps(cfg, per_epoch)
    epochs = f", {total / per_epoch:g} epochs of {len(source):,} samples" if per_epoch else ""
    return f"{total:,}{epochs}", classes


def _learning_rate(cfg: RunConfig) -> str:
    peak = peak_lr(cfg.optim, cfg.train.batch_size)
    if cfg.optim.lr is not None:
        return f"{peak:.4g} (optim.lr)"
    return f"{peak:.4g} = {cfg.optim.base_lr:g} x batch {cfg.train.batch_size} / 256"


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
