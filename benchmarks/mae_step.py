"""One MAE ViT-B/16 pre-training step against transformers' ViTMAEForPreTraining."""

from __future__ import annotations

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from benchmarks.measure import Row, alternate
from vlx.config.compose import compose
from vlx.core import registry
from vlx.core.method import Trainable
from vlx.core.step import StepContext
from vlx.encoders.build import EncoderBuilder
from vlx.engine.load import run_config

BATCH, SIZE, ROUNDS = 8, 224, 9


def main() -> list[Row]:
    torch.manual_seed(0)
    cfg = run_config(compose("mae", "pretrain-mim", "paper"))
    method = registry.load("mae")(cfg.method, EncoderBuilder({"encoder": cfg.encoder}, 1000))
    assert isinstance(method, Trainable)
    peer = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True))  # its defaults are ViT-B/16
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    batch = {"image": images, "sample_id": torch.arange(BATCH)}
    normalised = method.encoder.normalise(images)  # type: ignore[operator, union-attr]
    optimizers = [
        torch.optim.AdamW(m.parameters(), 1e-4, (0.9, 0.95), fused=True) for m in (method, peer)
    ]

    def our_step() -> None:
        optimizers[0].zero_grad()
        method.step(batch, StepContext(0, 1, 1, 0)).losses["recon"].backward()
        optimizers[0].step()

    def peer_step() -> None:
        optimizers[1].zero_grad()
        peer(normalised).loss.backward()
        optimizers[1].step()

    ours, theirs = alternate(our_step, peer_step, rounds=ROUNDS)
    name = f"MAE ViT-B/16 step at {SIZE}, batch {BATCH}, fp32"
    return [Row(name, ours, theirs, "s", "transformers ViTMAEForPreTraining", "<= 1")]
