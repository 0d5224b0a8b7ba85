"""Projectors over frozen encoders: their sizes, what stays as it was, and their identities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm, normalize

from tests.contract.build import build, context, smoke_batch
from vlx.blocks.projectors import ResidualHead, TokenProjector
from vlx.engine.config import OptimConfig
from vlx.engine.optim import build_optimizer
from vlx.methods.unimodal_projectors import UnimodalProjectors
from vlx.ops.contrastive import paired_cross_entropy


def projectors() -> UnimodalProjectors:
    method = build("unimodal-projectors")
    assert isinstance(method, UnimodalProjectors)
    return method


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("width", "expected"), [(1024, 3_150_848), (256, 592_640)])
def test_a_token_projector_has_the_cards_parameters(width: int, expected: int) -> None:
    assert count(TokenProjector(1024, width)) == expected


def test_a_head_has_the_cards_parameters() -> None:
    assert count(ResidualHead(1024, 1024)) == 2_101_248


def test_training_moves_the_projectors_and_leaves_the_encoders_bit_for_bit() -> None:
    method = projectors()
    frozen = {"towers.image.", "towers.text."}
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = build_optimizer(OptimConfig(), method.param_groups(), 1e-2)
    for step in range(2):
        optimizer.zero_grad()
        loss = method.step(smoke_batch("unimodal-projectors", seed=step), context(step))
        loss.losses["contrastive"].backward()
        optimizer.step()
    for name, value in method.state_dict().items():
        same = torch.equal(value, before[name])
        assert same is name.startswith(tuple(frozen)), name


def test_the_text_encoders_dropout_stays_on_in_training_and_the_images_are_in_eval_mode() -> None:
    method, batch = projectors().train(), smoke_batch("unimodal-projectors")
    text = method.towers.text
    out = [text(batch["text"], batch["text_length"]).tokens for _ in range(2)]
    assert not torch.equal(*out)
    assert not any(part.training for part in method.towers.image.modules())


def test_longer_padding_leaves_text_features_equal() -> None:
    method, batch = projectors().eval(), smoke_batch("unimodal-projectors")
    lengths = batch["text_length"].clamp(max=8)
    whole = method.towers.embed_text(batch["text"], lengths)
    short = method.towers.embed_text(batch["text"][:, :8], lengths)
    torch.testing.assert_close(whole, short, rtol=1e-5, atol=1e-5)


def test_identity_projectors_give_normed_class_token_plus_mean_of_normed_patches() -> None:
    method = projectors().eval()
    towers = method.towers
    dim = towers.image.module.spec.dim
    for name in ("patch_projector", "class_projector"):
        projector = TokenProjector(dim, dim).eval()
        with torch.no_grad():
            projector.linear.weight.copy_(torch.eye(dim))
            for part in (projector.linear.bias, projector.fc2.weight, projector.fc2.bias):
                part.zero_()
        setattr(towers, name, projector)
    images = torch.rand(3, 3, 32, 32)
    out = towers.image.module(images)
    expected = layer_norm(out.prefix[:, 0], (dim,)) + layer_norm(out.tokens, (dim,)).mean(1)
    torch.testing.assert_close(towers.embed_images(images), normalize(expected, dim=-1))


def test_identical_pairs_cannot_be_told_apart() -> None:
    features = normalize(torch.randn(4, 8), dim=1)
    same = features[[0, 0, 0, 1, 2, 3]]
    loss = paired_cross_entropy(same[:3], same[:3], torch.tensor(50.0))
    assert loss.item() >= math.log(3) - 1e-6


def test_the_temperature_divides_is_kept_within_bounds_and_is_decayed() -> None:
    method = projectors()
    assert method.temperature().item() == pytest.approx(1 / 0.07)
    for value, expected in ((9.0, 0.5), (-1.0, 0.001)):
        with torch.no_grad():
            method.temperature.value.fill_(value)
        method.after_step(context())
        assert 1 / method.temperature().item() == pytest.approx(expected)
    decay, no_decay = method.param_groups()
    assert "temperature.value" in {name for name, _ in decay.params}
    assert all(param.ndim == 1 and param.numel() > 1 for _, param in no_decay.params)
