"""Supervised training: what is trained, and agreement with timm."""

from __future__ import annotations

from dataclasses import replace

import timm
import torch
from torch.nn.functional import cross_entropy

from tests.contract.build import build, config, context, smoke_batch
from vlx.encoders.build import EncoderBuilder
from vlx.methods.supervised import Supervised


def test_the_loss_is_cross_entropy_of_timms_own_logits() -> None:
    method = build("supervised").eval()
    assert isinstance(method, Supervised)
    method.mixing = replace(method.mixing, smoothing=0.0)
    batch = smoke_batch("supervised")
    encoder = method.encoder
    with torch.no_grad():
        loss = method.step(batch, context()).losses["class"]
        logits = encoder.vit(encoder.normalise(batch["image"]))  # type: ignore[operator]
    torch.testing.assert_close(loss, cross_entropy(logits, batch["label"]))


def test_mixing_acts_in_training_alone() -> None:
    method = build("supervised")
    assert isinstance(method, Supervised)
    method.mixing = replace(method.mixing, mixup_alpha=0.8, cutmix_alpha=1.0)
    batch = smoke_batch("supervised")
    images, targets = method.mix(batch["image"], batch["label"], context())
    assert not torch.equal(images, batch["image"])
    torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
    again, _ = method.mix(batch["image"], batch["label"], context())
    assert torch.equal(images, again)
    other, _ = method.mix(batch["image"], batch["label"], context(step=1))
    assert not torch.equal(images, other)
    still, _ = method.eval().mix(batch["image"], batch["label"], context())
    assert torch.equal(still, batch["image"])


def test_freeze_trains_the_head_alone() -> None:
    cfg = config("supervised")
    builder = EncoderBuilder({"encoder": cfg.encoder}, 10, load_weights=False)
    method = Supervised(replace(cfg.method, freeze=True), builder)
    trained = {name for name, param in method.named_parameters() if param.requires_grad}
    assert trained == {"encoder.vit.head.weight", "encoder.vit.head.bias"}


def test_the_paper_preset_is_timms_deit() -> None:
    theirs = timm.create_model("deit_small_patch16_224")
    cfg = config("supervised", "paper").encoder
    ours = EncoderBuilder({"encoder": cfg}, 1000, load_weights=False).vision(num_classes=1000)
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.backbone.state_dict().items()} == shapes
