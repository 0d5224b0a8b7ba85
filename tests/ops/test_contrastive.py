"""The contrastive loss against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from vlx.ops.contrastive import clip_loss, mean_of_templates, paired_cross_entropy


def pairs(count: int = 12, dim: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(count, dim, generator=generator) for _ in range(2))
    return normalize(a, dim=1), normalize(b, dim=1)


def plain(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * images @ texts.T
    target = torch.arange(len(images))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def test_loss_and_gradients_equal_autograds() -> None:
    found, expected = [], []
    for loss, out in ((clip_loss, found), (plain, expected)):
        images, texts = (x.requires_grad_() for x in pairs())
        scale = torch.tensor(14.3, requires_grad=True)
        value = loss(images, texts, scale)
        out += [value, *torch.autograd.grad(3 * value, [images, texts, scale])]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_loss_equals_open_clips() -> None:
    from open_clip.loss import ClipLoss

    images, texts = pairs()
    scale = torch.tensor(20.0)
    torch.testing.assert_close(
        clip_loss(images, texts, scale), ClipLoss()(images, texts, scale), rtol=1e-5, atol=1e-6
    )


def test_equal_features_give_the_logarithm_of_the_batch() -> None:
    same = torch.ones(9, 4) / 2
    assert clip_loss(same, same, torch.tensor(1.0)).item() == pytest.approx(math.log(9), rel=1e-6)


def test_orthonormal_features_give_the_closed_form() -> None:
    for scale in (1.0, 5.0, 50.0):
        loss = clip_loss(torch.eye(8), torch.eye(8), torch.tensor(scale)).item()
        assert loss == pytest.approx(math.log1p(7 * math.exp(-scale)), rel=1e-4, abs=1e-6)


def test_the_order_of_the_pairs_does_not_matter() -> None:
    images, texts = pairs()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor(10.0)
    torch.testing.assert_close(
        clip_loss(images, texts, scale), clip_loss(images[order], texts[order], scale)
    )


def test_rows_of_a_part_see_the_columns_of_all() -> None:
    images, texts = pairs()
    scale = torch.tensor(10.0)
    whole = paired_cross_entropy(images, texts, scale)
    halves = [paired_cross_entropy(images[i : i + 6], texts, scale, i) for i in (0, 6)]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    images, texts = (x.requires_grad_() for x in pairs(64, 8))
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        clip_loss(images, texts, torch.tensor(10.0, requires_grad=True))
    assert kept
    assert max(kept) <= 64 * 8  # a block of logits would be 64 * 64


def test_class_weights_are_normalised_twice() -> None:
    features = normalize(torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    weights = mean_of_templates(features)
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(3))
    for c in range(3):
        mean = sum(features[c]) / 5
        torch.testing.assert_close(weights[c], mean / mean.norm())
