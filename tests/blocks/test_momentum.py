"""Momentum copies: how far they move, what they copy, that they never train."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vlx.blocks.momentum import MomentumCopy, follow, rising_momentum


def student() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_a_copy_starts_as_the_student_and_moves_by_its_share_of_the_way() -> None:
    module = student()
    teacher = MomentumCopy(module, 0.995)
    before = copy.deepcopy(teacher.module)
    teacher.update(module)
    for a, b in zip(teacher.module.parameters(), before.parameters()):
        assert torch.equal(a, b)
    with torch.no_grad():
        for param in module.parameters():
            param += torch.randn_like(param)
    teacher.update(module)
    for own, old, followed in zip(
        teacher.module.parameters(), before.parameters(), module.parameters()
    ):
        torch.testing.assert_close(own - old, 0.005 * (followed - old), rtol=1e-3, atol=1e-6)


def test_buffers_are_copied() -> None:
    module = student()
    teacher = MomentumCopy(module, 0.9)
    module(torch.randn(8, 3))
    teacher.update(module)
    for name, value in module.named_buffers():
        assert torch.equal(value, teacher.module.get_buffer(name)), name


def test_it_shares_no_weight_and_no_gradient_and_drops_out_in_training() -> None:
    module = student()
    around = nn.ModuleDict({"student": module, "teacher": MomentumCopy(module, 0.9)})
    own = {id(p) for p in around["teacher"].parameters()}
    assert own.isdisjoint(id(p) for p in module.parameters())
    assert not any(p.requires_grad for p in around["teacher"].parameters())
    assert all(p.requires_grad for p in module.parameters())
    for mode in (False, True):
        around.train(mode)
        assert around["teacher"].module[2].training is mode  # type: ignore[union-attr, index]


def test_following_moves_parameters_and_leaves_buffers() -> None:
    module, teacher = student(), student()
    module(torch.randn(8, 3))
    before = copy.deepcopy(teacher)
    follow(teacher, module, 0.75)
    for own, old, followed in zip(
        teacher.parameters(), before.parameters(), module.parameters(), strict=True
    ):
        torch.testing.assert_close(own, 0.75 * old + 0.25 * followed)
    for name, value in before.named_buffers():
        assert torch.equal(value, teacher.get_buffer(name)), name


def test_a_rising_momentum_is_byols() -> None:
    found = [rising_momentum(0.996, step, 100) for step in (0, 25, 50, 100)]
    assert found == pytest.approx([0.996, 0.996586, 0.998, 1.0], abs=1e-6)
