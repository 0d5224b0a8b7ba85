"""The evidence of a step whose loss is not finite, and its replay.

`RUN/nonfinite/step-N/` holds the weights as they were before the step (a checkpoint) and
`evidence.json`. A step is a pure function of weights, seed and step number, so one process can
compute it again, whatever number of processes it ran on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from vlx.core.errors import CheckpointError, VlxError
from vlx.core.files import parse_json, write_json
from vlx.core.method import Trainable
from vlx.core.random import step_seed
from vlx.core.step import StepContext
from vlx.data.open import open_source
from vlx.data.pipeline import TrainPipeline
from vlx.engine import checkpoint
from vlx.engine.build import begin_training, build_method, build_pipeline, total_steps
from vlx.engine.config import LauncherConfig, RunConfig
from vlx.engine.parallel import Parallel
from vlx.engine.step import mean_counts, total
from vlx.engine.text import run_tokenizer

FOLDER = "nonfinite"
_FILE = "evidence.json"


@dataclass(kw_only=True)
class Evidence:
    """What was seen."""

    step: int
    """Updates done before the step, which is the first argument of everything random."""
    world: int
    """Processes that shared the batch."""
    losses: dict[str, float]
    """Means over processes and micro-batches."""
    grad_norm: float
    sample_ids: list[list[list[int]]]
    """By process, micro-batch and position."""


@dataclass
class MicroBatch:
    """One micro-batch of one process, computed again."""

    rank: int
    micro: int
    losses: dict[str, float]
    sample_ids: list[int]


@dataclass
class Replay:
    """A step computed again."""

    evidence: Evidence
    micro_batches: list[MicroBatch]
    grad_norm: float
    """Of the whole step, before clipping."""


def save_evidence(run_dir: Path, evidence: Evidence, snapshot: checkpoint.Snapshot) -> Path:
    """Write the evidence and return its folder."""
    folder = run_dir / FOLDER / f"step-{evidence.step + 1:08d}"
    checkpoint.save(folder, snapshot)
    write_json(folder / _FILE, asdict(evidence))
    return folder


def read_evidence(folder: Path) -> Evidence:
    """The evidence of a folder; `VlxError` for one that is damaged."""
    try:
        return Evidence(**parse_json((folder / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise VlxError(f"{folder / _FILE} cannot be read: {error}") from error


def evidence_folders(run_dir: Path) -> list[Path]:
    """Folders with evidence, oldest step first."""
    return sorted(file.parent for file in (run_dir / FOLDER).glob(f"step-*/{_FILE}"))


def replay(cfg: RunConfig, folder: Path) -> Replay:
    """Compute the step again from its saved weights, in this process alone."""
    evidence = read_evidence(folder)
    saved = checkpoint.latest(folder)
    if saved is None:
        raise CheckpointError(f"{folder} holds no good copy of the weights")
    parallel = Parallel(cfg.train, LauncherConfig())
    try:
        source = open_source(cfg.data, cfg.data.train_split)
        tokenizer = run_tokenizer(cfg.text, folder.parent.parent)
        method = build_method(cfg, source, tokenizer, load_weights=False).to(parallel.device)
        pipeline = build_pipeline(cfg, source, type(method), parallel, tokenizer)
        method.load_state_dict(checkpoint.load(saved).model)
        begin_training(method, cfg.train)
        found = _micro_batches(method, cfg, pipeline, evidence, parallel)
        grads = [param.grad for param in method.parameters() if param.grad is not None]
        return Replay(evidence, found, float(nn.utils.get_total_norm(grads)))
    finally:
        parallel.close()


def _micro_batches(
    method: Trainable,
    cfg: RunConfig,
    pipeline: TrainPipeline,
    evidence: Evidence,
    parallel: Parallel,
) -> list[MicroBatch]:
    """Every micro-batch of every process, one after the other; gradients are added up."""
    steps, taken = [], []
    for rank in range(evidence.world):
        pipeline.share = replace(pipeline.share, rank=rank, world=evidence.world)
        for micro, batch in enumerate(pipeline.batches(evidence.step, evidence.step + 1)):
            steps.append(_context(cfg, pipeline, evidence.step, micro))
            taken.append((rank, micro, batch))
    counts = mean_counts(method, [batch for _, _, batch in taken], steps, parallel)
    found = []
    for (rank, micro, batch), ctx in zip(taken, steps, strict=True):
        seed = step_seed(cfg.seed, evidence.step, rank, micro)
        parallel.seed(seed)
        ctx.generator = torch.Generator(parallel.device).manual_seed(seed)
        ctx.counts = counts
        with parallel.accelerator.autocast():
            losses = method.step(batch, ctx).losses
            loss = total(losses)
        (loss / len(taken)).backward()
        values = {name: float(value) for name, value in losses.items()}
        found.append(MicroBatch(rank, micro, values, batch["sample_id"].tolist()))
    return found


def _context(cfg: RunConfig, pipeline: TrainPipeline, step: int, micro: int) -> StepContext:
    """Of the process whose share the pipeline takes."""
    return StepContext(
        step=step,
        total_steps=total_steps(cfg, pipeline.steps_per_epoch),
        steps_per_epoch=pipeline.steps_per_epoch,
        seed=cfg.seed,
        sample_offset=pipeline.share.offset(micro),
    )
