"""The evidence of a step whose loss is not finite, and its replay.

`RUN/nonfinite/step-N/` holds the weights as they were before the step (a checkpoint) and
`evidence.json`. A step is a pure function of weights, seed and step number, so one process can
compute it again, whatever number of processes it ran on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vlx.core.errors import CheckpointError, VlxError
from vlx.core.files import write_json
from vlx.core.method import StepContext
from vlx.core.random import step_seed
from vlx.data.open import open_source
from vlx.data.pipeline import Share
from vlx.engine import checkpoint
from vlx.engine.build import build_method, build_pipeline
from vlx.engine.config import RunConfig
from vlx.engine.parallel import Parallel

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
class Replayed:
    """One micro-batch of one process, computed again."""

    rank: int
    micro: int
    losses: dict[str, float]
    sample_ids: list[int]


def save_evidence(run_dir: Path, evidence: Evidence, snapshot: checkpoint.Snapshot) -> Path:
    """Write the evidence and return its folder."""
    folder = run_dir / FOLDER / f"step-{evidence.step + 1:08d}"
    checkpoint.save(folder, snapshot)
    write_json(folder / _FILE, asdict(evidence))
    return folder


def read_evidence(folder: Path) -> Evidence:
    """The evidence of a folder; `VlxError` for one that is damaged."""
    try:
        return Evidence(**json.loads((folder / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise VlxError(f"{folder / _FILE} cannot be read: {error}") from error


def evidence_folders(run_dir: Path) -> list[Path]:
    """Folders with evidence, oldest step first."""
    return sorted(file.parent for file in (run_dir / FOLDER).glob(f"step-*/{_FILE}"))


def replay(cfg: RunConfig, folder: Path) -> list[Replayed]:
    """Compute the step again from its saved weights: the losses of every micro-batch.

    `cfg` is the run's own, with a launcher of one process.
    """
    evidence = read_evidence(folder)
    saved = checkpoint.latest(folder)
    if saved is None:
        raise CheckpointError(f"{folder} holds no good copy of the weights")
    parallel = Parallel(cfg.train, cfg.launcher)
    try:
        source = open_source(cfg.data, cfg.data.train_split)
        method = build_method(cfg, source, load_weights=False).to(parallel.device)
        pipeline = build_pipeline(cfg, source, type(method), parallel)
        method.load_state_dict(checkpoint.load(saved).model)
        method.train()
        found = []
        for rank in range(evidence.world):
            pipeline.share = Share(cfg.train.batch_size, cfg.train.accumulate, rank, evidence.world)
            batches = pipeline.batches(evidence.step, evidence.step + 1)
            for micro, batch in enumerate(batches):
                seed = step_seed(cfg.seed, evidence.step, rank, micro)
                parallel.seed(seed)
                ctx = StepContext(
                    step=evidence.step,
                    total_steps=evidence.step + 1,
                    steps_per_epoch=pipeline.steps_per_epoch,
                    seed=cfg.seed,
                    sample_offset=pipeline.share.offset(micro),
                    generator=torch.Generator(parallel.device).manual_seed(seed),
                )
                with parallel.accelerator.autocast():
                    losses = method.step(batch, ctx).losses
                values = {name: float(loss) for name, loss in losses.items()}
                found.append(Replayed(rank, micro, values, batch["sample_id"].tolist()))
        return found
    finally:
        parallel.close()
