"""vlx's loop against a bare PyTorch loop: the same method, batches and optimizer."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.measure import Row, alternate, peak_mib
from vlx.config.compose import compose
from vlx.core import registry
from vlx.core.fields import Batch
from vlx.core.method import Trainable
from vlx.core.step import StepContext
from vlx.data.open import open_source
from vlx.data.pipeline import Share, TrainPipeline
from vlx.encoders.build import EncoderBuilder
from vlx.engine.config import RunConfig
from vlx.engine.load import run_config
from vlx.engine.loop import Hooks, Trainer
from vlx.engine.optim import build_optimizer, peak_lr
from vlx.engine.parallel import Parallel
from vlx.engine.signals import StopRequest
from vlx.track.base import Fanout
from vlx.track.console import ConsoleProgress
from vlx.track.jsonl import JsonlTrack

CASES = {
    # name: (overrides, steps a round, rounds, target)
    "demo's tiny model": ([], 40, 9, "< 1.10"),
    "ViT-S/16 at 224, batch 8": (
        ["encoder=vit_small", "train.batch_size=8", "method.decoder_dim=512",
         "method.decoder_depth=8", "method.decoder_heads=16"], 2, 7, "< 1.03",
    ),
}  # fmt: skip
_MANY = 1_000_000


class _Pipeline(TrainPipeline):
    """Batches made once, so that both loops see the same and only the loop is compared."""

    def prepare(self) -> None:
        self._made = [batch for _, batch in zip(range(8), super().batches(0, _MANY))]

    def batches(self, start_step: int, total_steps: int) -> Iterator[Batch]:
        for step in range(start_step, total_steps):
            yield self._made[step % len(self._made)]


def build(overrides: list[str]) -> tuple[RunConfig, Trainable, _Pipeline]:
    cfg = run_config(compose("mae", "pretrain-mim", "tiny", ["data.workers=0", *overrides]))
    torch.manual_seed(0)
    cls = registry.load("mae")
    method = cls(cfg.method, EncoderBuilder({"encoder": cfg.encoder}, 10))
    assert isinstance(method, Trainable)
    pipeline = _Pipeline(
        open_source(cfg.data, "train"),
        cls.needs(cfg.method),
        cfg=cfg.data,
        image_size=cfg.encoder.image_size,
        seed=0,
        share=Share(cfg.train.batch_size),
        device=torch.device("cpu"),
    )
    pipeline.prepare()
    return cfg, method, pipeline


def vlx_loop(overrides: list[str], run_dir: Path) -> Trainer:
    cfg, method, pipeline = build(overrides)
    console = Console(quiet=True)
    hooks = Hooks(
        evaluate=lambda step: {},
        track=Fanout([JsonlTrack(run_dir / "metrics.jsonl", 0)]),
        console=ConsoleProgress(console, "", 0, _MANY),
        stop=StopRequest(),
        on_save=lambda step: None,
    )
    trainer = Trainer(
        cfg, method, pipeline, Parallel(cfg.train, cfg.launcher),
        total_steps=_MANY, run_dir=run_dir, hooks=hooks, saved_config={},
    )  # fmt: skip
    trainer.save = lambda: None  # type: ignore[method-assign]
    return trainer


def fit(trainer: Trainer, steps: int) -> None:
    trainer.total_steps = trainer.progress.step + steps
    trainer.fit()


class BareLoop:
    """What a researcher writes in ten lines."""

    def __init__(self, overrides: list[str]) -> None:
        self.cfg, self.method, self.pipeline = build(overrides)
        peak = peak_lr(self.cfg.optim, self.cfg.train.batch_size)
        self.optimizer = build_optimizer(self.cfg.optim, self.method.param_groups(), peak)
        self.done = 0

    def fit(self, steps: int) -> None:
        batches = self.pipeline.batches(self.done, self.done + steps)
        for step, batch in enumerate(batches, start=self.done):
            ctx = StepContext(step, _MANY, self.pipeline.steps_per_epoch, 0)
            loss = self.method.step(batch, ctx).losses["recon"]
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.done += steps


def peak_memory(which: str, overrides: list[str], steps: int) -> float:
    """Peak MiB of a fresh process that runs one of the loops."""
    words = [sys.executable, "-m", "benchmarks.loop", which, str(steps), *overrides]
    return float(
        subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def main() -> list[Row]:
    rows = []
    peer_name = "bare PyTorch loop"
    for name, (overrides, steps, rounds, target) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            our_loop = partial(fit, vlx_loop(overrides, Path(folder)), steps)
            bare_loop = partial(BareLoop(overrides).fit, steps)
            ours, peer = alternate(our_loop, bare_loop, rounds=rounds)
        scale = 1000 / steps
        rows.append(Row(f"step, {name}", ours * scale, peer * scale, "ms", peer_name, target))
        memory = [peak_memory(which, overrides, 3 * steps) for which in ("vlx", "bare")]
        rows.append(Row(f"peak memory, {name}", memory[0], memory[1], "MiB", peer_name, "about 1"))
    return rows


if __name__ == "__main__":
    chosen, count, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    if chosen == "vlx":
        with tempfile.TemporaryDirectory() as tmp:
            fit(vlx_loop(words, Path(tmp)), count)
    else:
        BareLoop(words).fit(count)
    print(peak_mib())
