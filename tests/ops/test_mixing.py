"""Mixup, CutMix and soft targets against timm's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.data import mixup as timm_mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from vlx.ops.mixing import Mixing, Mixture, soft_target_cross_entropy

CLASSES = 7


def batch(count: int = 6, height: int = 20, width: int = 28) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, height, width, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def theirs(
    mixture: Mixture, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """timm's batch mode with our draws in place of its own."""
    images, labels = batch()
    mixup = timm_mixup.Mixup(num_classes=CLASSES, label_smoothing=smoothing, mode="batch")
    monkeypatch.setattr(
        mixup, "_params_per_batch", lambda: (mixture.lam, mixture.centre is not None)
    )
    if mixture.centre is not None:
        places = [int(c * side) for c, side in zip(mixture.centre, images.shape[-2:])]
        draws = iter(places)
        monkeypatch.setattr(timm_mixup.np.random, "randint", lambda *a, **k: next(draws))
    return mixup(images, labels)


CENTRES = [None, (0.5, 0.5), (0.0, 0.0), (0.99, 0.3), (0.21, 0.999)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [0.0, 0.013, 0.3, 0.5, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("centre", CENTRES)
def test_images_and_targets_equal_timm_s_exactly(
    centre: tuple[float, float] | None,
    lam: float,
    smoothing: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mixture = Mixture(lam, centre)
    images, labels = batch()
    before = images.clone()
    mixed, targets = Mixing(smoothing=smoothing).apply(images, labels, CLASSES, mixture)
    their_images, their_targets = theirs(mixture, smoothing, monkeypatch)
    assert torch.equal(mixed, their_images)
    assert torch.equal(targets, their_targets)
    assert targets.dtype == torch.float32
    assert torch.equal(images, before)


@pytest.mark.parametrize("centre", CENTRES[1:])
def test_a_target_s_weight_is_the_area_that_is_left(centre: tuple[float, float]) -> None:
    images = torch.stack([torch.zeros(3, 20, 28), torch.ones(3, 20, 28)])
    mixing = Mixing(smoothing=0.0)
    mixed, targets = mixing.apply(images, torch.tensor([0, 1]), 2, Mixture(0.4, centre))
    share = mixed[0, 0].mean()  # of the partner's pixels
    assert 0 < share < 0.6 + 1e-6
    torch.testing.assert_close(targets, torch.tensor([[1 - share, share], [share, 1 - share]]))


@pytest.mark.parametrize("mixture", [Mixture(0.3), Mixture(0.3, (0.4, 0.6))])
@pytest.mark.parametrize("count", [1, 5])
def test_the_middle_of_an_odd_batch_is_its_own_partner(count: int, mixture: Mixture) -> None:
    images, labels = batch(count)
    mixed, targets = Mixing().apply(images, labels, CLASSES, mixture)
    middle = count // 2
    torch.testing.assert_close(mixed[middle], images[middle])
    plain = Mixing().apply(images, labels, CLASSES, Mixture())[1]
    torch.testing.assert_close(targets[middle], plain[middle])
    for i in range(count):
        pair = [i, count - 1 - i]
        alone, alone_targets = Mixing().apply(images[pair], labels[pair], CLASSES, mixture)
        assert torch.equal(mixed[i], alone[0])  # nothing but the partner counts
        assert torch.equal(targets[i], alone_targets[0])


def test_without_alphas_labels_are_smoothed_and_images_stay() -> None:
    images, labels = batch()
    mixing = Mixing(mixup_alpha=0.0, cutmix_alpha=0.0, smoothing=0.1)
    mixture = mixing.draw(np.random.default_rng(0))
    assert mixture == Mixture()
    mixed, targets = mixing.apply(images, labels, CLASSES, mixture)
    assert torch.equal(mixed, images)
    expected = torch.full((len(labels), CLASSES), 0.1 / CLASSES)
    expected[torch.arange(len(labels)), labels] += 0.9
    torch.testing.assert_close(targets, expected)


# --- draws


def draws(mixing: Mixing, count: int = 4000) -> list[Mixture]:
    generator = np.random.default_rng(0)
    return [mixing.draw(generator) for _ in range(count)]


def test_a_draw_is_a_function_of_its_generator_alone() -> None:
    state = torch.get_rng_state()
    assert draws(Mixing(), 20) == draws(Mixing(), 20)
    assert len({m.lam for m in draws(Mixing(), 20)}) == 20
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("mixing", "cut"),
    [
        (Mixing(switch_p=0.3), 0.3),
        (Mixing(switch_p=0.0), 0.0),
        (Mixing(switch_p=1.0), 1.0),
        (Mixing(mixup_alpha=0.0, switch_p=0.3), 1.0),
        (Mixing(cutmix_alpha=0.0, switch_p=0.3), 0.0),
    ],
)
def test_cutmix_has_its_probability(mixing: Mixing, cut: float) -> None:
    share = sum(m.centre is not None for m in draws(mixing)) / 4000
    assert abs(share - cut) <= 5 * math.sqrt(cut * (1 - cut) / 4000)


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_a_step_mixes_with_probability_p(p: float) -> None:
    share = sum(m != Mixture() for m in draws(Mixing(p=p))) / 4000
    assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / 4000)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_weights_follow_the_beta_distribution(kind: str, alpha: float) -> None:
    other = "cutmix" if kind == "mixup" else "mixup"
    mixing = Mixing(**{f"{kind}_alpha": alpha, f"{other}_alpha": 0.0})
    lam = torch.tensor([m.lam for m in draws(mixing)], dtype=torch.float64)
    assert ((lam >= 0) & (lam <= 1)).all()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lam.mean() - 0.5) < 5 * math.sqrt(variance / 4000)
    square = (lam - 0.5) ** 2
    assert abs(square.mean() - variance) < 5 * float(square.std()) / math.sqrt(4000)


def test_centres_are_uniform_over_the_image() -> None:
    centres = torch.tensor([m.centre for m in draws(Mixing(mixup_alpha=0.0))])
    for axis in range(2):
        counts = torch.histc(centres[:, axis], 10, 0.0, 1.0)
        assert ((counts - 400).abs() < 5 * math.sqrt(400)).all()
    assert abs(torch.corrcoef(centres.T)[0, 1]) < 5 / math.sqrt(4000)


# --- loss


def test_the_loss_equals_timm_s_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, CLASSES, generator=generator)
    _, targets = Mixing().apply(*batch(), CLASSES, Mixture(0.3))
    mine, other = (logits.clone().requires_grad_() for _ in range(2))
    loss = soft_target_cross_entropy(mine, targets)
    expected = SoftTargetCrossEntropy()(other, targets)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)  # sums in another order
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-7)


def test_the_loss_of_one_hot_targets_is_the_cross_entropy() -> None:
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))
    _, labels = batch()
    targets = torch.nn.functional.one_hot(labels, CLASSES).float()
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(soft_target_cross_entropy(logits, targets), expected)


def test_the_loss_of_half_precision_logits_is_computed_in_float32() -> None:
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, targets = Mixing().apply(*batch(), CLASSES, Mixture(0.3))
    loss = soft_target_cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, soft_target_cross_entropy(logits.float(), targets))
