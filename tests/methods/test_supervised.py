"""Supervised training: what is trained, and agreement with timm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from tests.contract.build import build, config, context, smoke_batch
from vlx.core.errors import ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.methods.supervised import Supervised, Tune


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


def tuned(tune: Tune, **keys) -> Supervised:
    cfg = config("supervised")
    builder = EncoderBuilder({"encoder": cfg.encoder}, 10, load_weights=False)
    torch.manual_seed(0)
    return Supervised(replace(cfg.method, tune=tune, **keys), builder)


def trained_names(method: Supervised) -> set[str]:
    return {name for name, param in method.named_parameters() if param.requires_grad}


HEAD = {"encoder.vit.head.weight", "encoder.vit.head.bias"}


def test_head_trains_the_head_alone() -> None:
    assert trained_names(tuned(Tune.head)) == HEAD


def test_layers_trains_the_last_blocks_the_norm_and_the_head() -> None:
    method = tuned(Tune.layers, tuned_layers=1)
    last = method.encoder.spec.depth - 1
    found = trained_names(method)
    blocks = {name for name in found if ".blocks." in name}
    assert blocks
    assert all(name.startswith(f"encoder.vit.blocks.{last}.") for name in blocks)
    assert found - blocks == HEAD | {"encoder.vit.norm.weight", "encoder.vit.norm.bias"}
    with pytest.raises(ConfigError, match=r"method\.tuned_layers=99"):
        tuned(Tune.layers, tuned_layers=99)


@pytest.mark.parametrize("tune", [Tune.lora, Tune.ia3])
def test_adapters_start_as_the_plain_model_and_leave_it_frozen(tune: Tune) -> None:
    plain, method = tuned(Tune.head).eval(), tuned(tune).eval()
    head = plain.encoder.vit.head.state_dict()
    method.encoder.vit.head.load_state_dict(head)
    batch = smoke_batch("supervised")
    torch.testing.assert_close(
        method.class_logits(batch["image"]), plain.class_logits(batch["image"])
    )
    found = trained_names(method)
    assert found == HEAD | set(method.inserted())
    assert len(method.inserted()) > 0


def test_lora_has_the_counted_parameters() -> None:
    method = tuned(Tune.lora, rank=4)
    spec = method.encoder.spec
    expected = spec.depth * 4 * ((spec.dim + 3 * spec.dim) + (spec.dim + spec.dim))
    inserted = dict(method.named_parameters())
    assert sum(inserted[name].numel() for name in method.inserted()) == expected


def test_the_paper_preset_is_timms_deit() -> None:
    theirs = timm.create_model("deit_small_patch16_224")
    cfg = config("supervised", "paper").encoder
    ours = EncoderBuilder({"encoder": cfg}, 1000, load_weights=False).vision(num_classes=1000)
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.backbone.state_dict().items()} == shapes


def test_layer_decay_groups_equal_timms_but_for_the_final_norm() -> None:
    """timm counts the norm to the last layer; MAE's and BEiT's code, as ours, to the head."""
    from timm.optim import param_groups_layer_decay

    from vlx.engine.optim import layer_scales

    method = build("supervised")
    assert isinstance(method, Supervised)
    ours = {
        name.removeprefix("encoder.vit."): (
            pytest.approx(group.lr_scale),
            group.weight_decay != 0.0,
        )
        for group in layer_scales(method.param_groups(), method, 0.65)
        for name, _ in group.params
    }
    vit = method.encoder.vit
    names = {id(param): name for name, param in vit.named_parameters()}
    theirs = {
        names[id(param)]: (group["lr_scale"], group["weight_decay"] != 0.0)
        for group in param_groups_layer_decay(
            vit, 0.05, no_weight_decay_list=vit.no_weight_decay(), layer_decay=0.65
        )
        for param in group["params"]
    }
    for name in ("norm.weight", "norm.bias"):
        assert theirs.pop(name) == (pytest.approx(0.65), False)
        assert ours.pop(name) == (1.0, False)
    assert ours == theirs
