"""Optimizers and schedules against torch's and timm's own."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars
from torch import nn

from vlx.core.config import MethodConfig
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch, Needs, ViewSpec
from vlx.core.method import Builder, Trainable
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig
from vlx.engine.config import OptimConfig, Optimizer, Schedule, ScheduleConfig, TrainConfig
from vlx.engine.ema import Ema
from vlx.engine.optim import build_optimizer, layer_scales, peak_lr
from vlx.engine.schedule import Rates
from vlx.engine.swad import averaging

STEPS, EPOCH = 100, 10


class TinyProbe(Trainable):
    """A fine-tuning method as small as can be: an encoder, a norm of its own, a head."""

    Config = MethodConfig

    def __init__(self, cfg: MethodConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.encoder = build.vision()
        self.head = nn.Linear(self.encoder.spec.dim, build.num_classes)

    @classmethod
    def needs(cls, cfg: Any) -> Needs:
        return Needs(views=(ViewSpec("image", ops=()),))

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        logits = self.head(self.encoder(batch["image"]).tokens.mean(1))
        return StepOutput({"square": logits.square().mean()})


@pytest.fixture
def probe() -> TinyProbe:
    encoder = EncoderConfig(
        name="vit_tiny_patch16_224", image_size=8, patch_size=2, dim=12, depth=3, heads=3
    )
    torch.manual_seed(0)
    return TinyProbe(MethodConfig(), EncoderBuilder({"encoder": encoder}, num_classes=10))


# Optimizers

REFERENCES = {
    Optimizer.adamw: lambda groups, cfg: torch.optim.AdamW(
        groups, lr=cfg.lr, betas=tuple(cfg.betas), weight_decay=cfg.weight_decay
    ),
    Optimizer.adam: lambda groups, cfg: torch.optim.Adam(
        groups, lr=cfg.lr, betas=tuple(cfg.betas), weight_decay=cfg.weight_decay
    ),
    Optimizer.rmsprop: lambda groups, cfg: torch.optim.RMSprop(
        groups, lr=cfg.lr, alpha=cfg.alpha, momentum=cfg.momentum, weight_decay=cfg.weight_decay
    ),
    Optimizer.sgd: lambda groups, cfg: torch.optim.SGD(
        groups, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay
    ),
    Optimizer.lars: lambda groups, cfg: Lars(
        groups, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay
    ),
    Optimizer.lamb: lambda groups, cfg: Lamb(
        groups, lr=cfg.lr, betas=tuple(cfg.betas), weight_decay=cfg.weight_decay,
        max_grad_norm=None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(Optimizer), ids=lambda o: o.name)
def test_steps_equal_the_librarys_own(name: Optimizer, probe: TinyProbe) -> None:
    cfg = OptimConfig(name=name, lr=0.01, weight_decay=0.1, momentum=0.8, betas=[0.8, 0.9])
    own = build_optimizer(cfg, probe.param_groups(), 0.01)
    rates = Rates(ScheduleConfig(name=Schedule.constant), 0.01, 0.1, STEPS, EPOCH)
    twins = [p.detach().clone().requires_grad_() for p in probe.parameters()]
    plain = [
        {"params": [t for t in twins if t.ndim >= 2]},
        {"params": [t for t in twins if t.ndim < 2], "weight_decay": 0.0},
    ]
    reference = REFERENCES[name](plain, cfg)
    for step in range(3):
        torch.manual_seed(step)
        for param, twin in zip(probe.parameters(), twins):
            param.grad = torch.randn_like(param)
            twin.grad = param.grad.clone()
        rates.apply(own, step)
        own.step()
        reference.step()
    for param, twin in zip(probe.parameters(), twins):
        # Fused kernels add and multiply in one rounding.
        torch.testing.assert_close(param.detach(), twin.detach(), rtol=1e-5, atol=1e-6)


def test_base_rate_is_for_a_batch_of_256() -> None:
    assert peak_lr(OptimConfig(base_lr=1.5e-4), 4096) == pytest.approx(2.4e-3)
    assert peak_lr(OptimConfig(base_lr=1.5e-4, lr=1.0), 4096) == 1.0


# Layer-wise decay


def test_layer_decay_is_that_of_maes_fine_tuning(probe: TinyProbe) -> None:
    """scale = decay ** (depth + 1 - id): embeddings are 0, block i is i + 1, head and norm 1."""
    groups = layer_scales(probe.param_groups(), probe, 0.5)
    scale = {name: group.lr_scale for group in groups for name, _ in group.params}
    assert scale["encoder.vit.patch_embed.proj.weight"] == 0.5**4
    assert scale["encoder.vit.cls_token"] == scale["encoder.vit.pos_embed"] == 0.5**4
    for block in range(3):
        assert scale[f"encoder.vit.blocks.{block}.attn.qkv.weight"] == 0.5 ** (3 - block)
    assert scale["encoder.vit.norm.weight"] == scale["head.weight"] == scale["head.bias"] == 1.0
    assert scale.keys() == dict(probe.named_parameters()).keys()
    undecayed = {n for g in groups if g.weight_decay == 0.0 for n, _ in g.params}
    assert undecayed == {n for n, p in probe.named_parameters() if p.ndim < 2}


def test_layer_ten_is_not_taken_for_layer_one() -> None:
    encoder = EncoderConfig(
        name="vit_tiny_patch16_224", image_size=8, patch_size=4, dim=12, depth=12, heads=3
    )
    probe = TinyProbe(MethodConfig(), EncoderBuilder({"encoder": encoder}, num_classes=2))
    groups = layer_scales(probe.param_groups(), probe, 0.65)
    scale = {name: group.lr_scale for group in groups for name, _ in group.params}
    for block in range(12):
        assert scale[f"encoder.vit.blocks.{block}.norm1.bias"] == 0.65 ** (12 - block)


def test_frozen_encoder_has_no_layers_to_scale(probe: TinyProbe) -> None:
    probe.encoder.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"optim.layer_decay=0.5: this method's encoder names no"):
        layer_scales(probe.param_groups(), probe, 0.5)


# Averages


def test_average_equals_the_hand_computed_one() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    ema = Ema(layer, 0.9)
    expected = layer.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            layer.weight.add_(step)
        ema.update()
        expected = 0.9 * expected + 0.1 * layer.weight.detach()
    assert ema.shadow.keys() == {"weight"}
    torch.testing.assert_close(ema.shadow["weight"], expected)
    trained = layer.weight.detach().clone()
    with ema.swapped():
        torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(layer.weight, trained)
    torch.testing.assert_close(ema.shadow["weight"], expected)


def test_decay_of_an_average_keeps_its_memory_in_samples() -> None:
    """RMT: 0.99996 ** (batch / 512) is 0.99984 at the 2048 of its logs."""
    method = nn.Linear(2, 2)
    ema = averaging(TrainConfig(batch_size=2048, ema_decay=0.99996, ema_batch=512), method)
    assert isinstance(ema, Ema)
    assert ema.decay == pytest.approx(0.99984, abs=1e-8)
    fixed = averaging(TrainConfig(batch_size=2048, ema_decay=0.99996), method)
    assert isinstance(fixed, Ema)
    assert fixed.decay == 0.99996


def test_what_a_batch_norm_has_seen_is_averaged_with_its_weights() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).requires_grad_(False))
    ema = Ema(model, 0.5)
    model(torch.full((4, 2), 8.0))  # the running mean goes a tenth of the way to 8
    ema.update()
    assert ema.shadow.keys() == {"0.weight", "0.bias", "0.running_mean", "0.running_var"}
    torch.testing.assert_close(ema.shadow["0.running_mean"], torch.full((2,), 0.4))
    with ema.swapped():
        torch.testing.assert_close(model[0].running_mean, torch.full((2,), 0.4))
    torch.testing.assert_close(model[0].running_mean, torch.full((2,), 0.8))


def test_lamb_resumes_its_step_count(probe: TinyProbe) -> None:
    """timm keeps it in the group: without it the bias correction would start anew."""
    from vlx.engine.checkpoint import load_optimizer, optimizer_tensors

    cfg = OptimConfig(name=Optimizer.lamb, lr=0.01)
    optimizer = build_optimizer(cfg, probe.param_groups(), 0.01)
    for param in probe.parameters():
        param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.step()
    saved = optimizer_tensors(optimizer)
    fresh = build_optimizer(cfg, probe.param_groups(), 0.01)
    load_optimizer(fresh, saved)
    kept = {name: p.detach().clone() for name, p in probe.named_parameters()}
    optimizer.step()
    expected = {name: p.detach().clone() for name, p in probe.named_parameters()}
    for name, param in probe.named_parameters():
        param.data.copy_(kept[name])
    fresh.step()
    assert all(param.equal(expected[name]) for name, param in probe.named_parameters())


def test_clipping_scales_to_the_norm_and_reports_what_it_was() -> None:
    from vlx.engine.parallel import Parallel

    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))]
    for param in params:
        param.grad = torch.full_like(param, 3.0)
    owner = SimpleNamespace()
    norm = Parallel.clip(owner, params, None)  # type: ignore[arg-type]
    assert norm == pytest.approx(math.sqrt(7 * 9))
    assert params[0].grad is not None
    assert params[0].grad[0] == 3.0
    assert Parallel.clip(owner, params, 1.0) == pytest.approx(math.sqrt(7 * 9))  # type: ignore[arg-type]
    total = sum(float(p.grad.square().sum()) for p in params if p.grad is not None)
    assert total == pytest.approx(1.0, rel=1e-5)
