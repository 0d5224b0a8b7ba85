"""RandAugment's operations against timm's, which are PIL's on uint8."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_aa
from torch import Tensor
from torchvision import transforms

from tests.data.make import picture
from vlx.ops.auto_augment import AutoAugment
from vlx.ops.rand_augment import (
    AFFINE,
    ALBEF_RANDOM,
    OPERATIONS,
    RandAugment,
    Ranges,
    Strength,
)
from vlx.ops.resample import Interpolation

FILL = (124, 116, 104)  # the ImageNet mean in levels, as timm rounds it
PIL_FILTERS = {
    Interpolation.bilinear: Image.Resampling.BILINEAR,
    Interpolation.bicubic: Image.Resampling.BICUBIC,
}
# Our name: timm's in its increasing set, and in the other where that differs.
TIMM = {
    "auto_contrast": ("AutoContrast",),
    "equalize": ("Equalize",),
    "invert": ("Invert",),
    "posterize": ("PosterizeIncreasing", "Posterize"),
    "solarize": ("SolarizeIncreasing", "Solarize"),
    "solarize_add": ("SolarizeAdd",),
    "contrast": ("ContrastIncreasing", "Contrast"),
    "brightness": ("BrightnessIncreasing", "Brightness"),
    "color": ("ColorIncreasing", "Color"),
    "sharpness": ("SharpnessIncreasing", "Sharpness"),
    "rotate": ("Rotate",),
    "shear_x": ("ShearX",),
    "shear_y": ("ShearY",),
    "translate_x": ("TranslateXRel",),
    "translate_y": ("TranslateYRel",),
}
COLOUR = [name for name in OPERATIONS if name not in AFFINE]


def pictures() -> list[np.ndarray]:
    """uint8 images of one size: smooth, noisy, narrow in range, of few levels, of one colour."""
    rng = np.random.default_rng(0)
    shape = (40, 56, 3)
    return [
        np.concatenate([picture(1, 40), picture(2, 40)[:, :16]], axis=1),
        rng.integers(0, 256, shape, np.uint8),
        rng.integers(60, 130, shape, np.uint8),
        rng.choice(np.array([3, 90, 91, 250], np.uint8), shape),
        np.full(shape, 77, np.uint8),
    ]


def to_tensor(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) * (1 / 255)


def ours(arrays: list[np.ndarray], op: RandAugment, u: Tensor) -> np.ndarray:
    """(B, H, W, 3) levels as int, which must be whole."""
    x = to_tensor(arrays)
    sizes = torch.tensor(x.shape[-2:]).expand(len(x), 2)
    levels = op(x, sizes, u, x.shape[-1]) * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    return levels.round().to(torch.int64).permute(0, 2, 3, 1).numpy()


def choosing(name: str, count: int, sign: int) -> Tensor:
    """Uniforms (count, 4) with which every sample draws `name`, done, at the mean strength."""
    place = (OPERATIONS.index(name) + 0.5) / len(OPERATIONS)
    return torch.tensor([place, 0.0, 0.5, 0.25 if sign > 0 else 0.75]).expand(count, 4)


def fixed(magnitude: float, **fields) -> RandAugment:
    return RandAugment(magnitude=magnitude, num_ops=1, magnitude_std=0.0, p=1.0, **fields)


def timm_op(
    name: str, op: RandAugment, sign: int, monkeypatch: pytest.MonkeyPatch
) -> timm_aa.AugmentOp:
    monkeypatch.setattr(timm_aa, "_randomly_negate", lambda value: sign * value)
    names = TIMM[name]
    hparams = {
        "img_mean": FILL,
        "interpolation": PIL_FILTERS[op.interpolation],
        "magnitude_std": op.magnitude_std,
    }
    chosen = names[0] if op.ranges.increasing else names[-1]
    return timm_aa.AugmentOp(chosen, prob=1.0, magnitude=op.magnitude, hparams=hparams)


def theirs(
    name: str,
    arrays: list[np.ndarray],
    op: RandAugment,
    sign: int,
    monkeypatch: pytest.MonkeyPatch,
) -> np.ndarray:
    change = timm_op(name, op, sign, monkeypatch)
    return np.stack([np.asarray(change(Image.fromarray(a))) for a in arrays]).astype(int)


def test_the_operations_are_timm_s_increasing_set() -> None:
    assert tuple(TIMM) == OPERATIONS
    assert sorted(names[0] for names in TIMM.values()) == sorted(
        timm_aa.rand_augment_choices("", increasing=True)
    )
    assert sorted(names[-1] for names in TIMM.values()) == sorted(
        timm_aa.rand_augment_choices("", increasing=False)
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "increasing", "magnitude"),
    [
        (name, increasing, magnitude)
        for name in COLOUR
        for increasing in (True, False)
        for magnitude in (0.0, 2.0, 5.0, 7.3, 9.0, 9.99)
        # 0 bits: below.
        if (name, increasing) != ("posterize", False) or magnitude >= 2.5
    ],
)
def test_colour_operations_equal_timm_to_a_level(
    name: str, increasing: bool, magnitude: float, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = fixed(magnitude, ranges=Ranges(increasing=increasing))
    arrays = pictures()
    expected = theirs(name, arrays, op, sign, monkeypatch)
    found = ours(arrays, op, choosing(name, len(arrays), sign))
    assert np.abs(found - expected).max() <= 1
    # A product that comes out whole in PIL's double may fall below it in our float32.
    assert (found != expected).mean() < 0.06


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [0.0, 2.0, 5.0, 7.3, 9.0, 10.0])
@pytest.mark.parametrize("name", AFFINE)
def test_affine_operations_equal_timm_with_a_bilinear_kernel(
    name: str, magnitude: float, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = fixed(magnitude, interpolation=Interpolation.bilinear)
    arrays = pictures()
    expected = theirs(name, arrays, op, sign, monkeypatch)
    apart = np.abs(ours(arrays, op, choosing(name, len(arrays), sign)) - expected)
    # The whole image, its rim too: PIL's rule of what lies outside is ours. Where a blend comes out
    # whole, its fraction is cut off on one side in double and on the other in float32.
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.06


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", AFFINE)
def test_bicubic_affine_operations_are_near_timm_s(
    name: str, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels differ, a = -0.75 in torch and -1 in PIL, by little where images are smooth."""
    op = fixed(9.0)
    smooth = [picture(i, 64) for i in range(4)]
    expected = theirs(name, smooth, op, sign, monkeypatch)
    apart = np.abs(ours(smooth, op, choosing(name, 4, sign)) - expected)
    assert apart.mean() < 0.6
    uncovered = (expected == FILL).all(-1)
    assert uncovered.any()
    assert apart[uncovered].mean() < 0.05
    bilinear = ours(
        smooth, fixed(9.0, interpolation=Interpolation.bilinear), choosing(name, 4, sign)
    )
    assert (bilinear != ours(smooth, op, choosing(name, 4, sign))).any()


@pytest.mark.parametrize(("magnitude", "increasing"), [(10.0, True), (2.4, False)])
def test_posterising_to_no_bits_is_black(magnitude: float, increasing: bool) -> None:
    """Pillow gave this until it refused 0 bits, and DeiT's strengths reach it."""
    op = fixed(magnitude, ranges=Ranges(increasing=increasing))
    found = ours(pictures(), op, choosing("posterize", 5, 1))
    assert (found == 0).all()


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_tiny_images(name: str, side: int) -> None:
    found = ours([picture(4, side)], fixed(9.0), choosing(name, 1, 1))
    assert found.shape == (1, side, side, 3)
    assert found.min() >= 0
    assert found.max() <= 255


# --- ALBEF's, AutoAugment


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["translate_x", "translate_y"])
def test_albef_shifts_by_seven_pixels_and_shows_grey(name: str, sign: int) -> None:
    op = replace(ALBEF_RANDOM, num_ops=1, p=1.0, operations=OPERATIONS)
    source = pictures()[1].astype(int)
    found = ours([pictures()[1]], op, choosing(name, 1, sign))[0]
    axis = 1 if name == "translate_x" else 0
    expected = np.roll(source, -7 * sign, axis)
    uncovered = slice(-7, None) if sign > 0 else slice(0, 7)
    expected[(slice(None),) * axis + (uncovered,)] = 128
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("name", ["brightness", "sharpness"])
@pytest.mark.parametrize("sign", [1, -1])
def test_albef_s_factor_is_1_36_whatever_the_sign(name: str, sign: int) -> None:
    from PIL import ImageEnhance

    op = replace(ALBEF_RANDOM, num_ops=1, p=1.0, operations=OPERATIONS)
    enhance = getattr(ImageEnhance, name.capitalize())
    expected = np.stack([np.asarray(enhance(Image.fromarray(a)).enhance(1.36)) for a in pictures()])
    found = ours(pictures(), op, choosing(name, len(pictures()), sign))
    assert np.abs(found - expected.astype(int)).max() <= 1


def test_albef_draws_from_its_ten_and_always_at_seven() -> None:
    count = 20_000
    operation, level, _ = ALBEF_RANDOM.parameters(uniforms(count, ALBEF_RANDOM.draws))
    assert set(level.unique().tolist()) == {7.0}
    drawn = torch.bincount(operation.flatten(), minlength=16)
    absent = {"invert", "posterize", "solarize", "solarize_add", "contrast", "color"}
    assert {OPERATIONS[i] for i in range(15) if drawn[i] == 0} == absent
    assert abs(drawn[15] / (2 * count) - 0.55) < 0.02  # not done, or the identity


TORCHVISION = {
    "Invert": "invert", "Contrast": "contrast", "Rotate": "rotate", "TranslateX": "translate_x",
    "TranslateY": "translate_y", "Sharpness": "sharpness", "ShearX": "shear_x", "ShearY": "shear_y",
    "AutoContrast": "auto_contrast", "Equalize": "equalize", "Posterize": "posterize",
    "Color": "color", "Brightness": "brightness", "Solarize": "solarize",
}  # fmt: skip


def test_the_policy_and_its_strengths_are_torchvision_s() -> None:
    their = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    space = their._augmentation_space(10, (56, 40))
    op = AutoAugment()
    assert len(their.policies) == len(op.policy)
    for row, steps in enumerate(their.policies):
        at = (row + 0.5) / len(op.policy)
        u = torch.tensor([[at, 0.0, 0.5, 0.25, 0.5, 0.0, 0.5, 0.25]])
        operation, level, sign = op.parameters(u)
        for step, (name, p, place) in enumerate(steps):
            assert op.policy[row][step][:2] == (TORCHVISION[name], p)
            if p == 0.0:
                continue
            assert OPERATIONS[int(operation[0, step])] == TORCHVISION[name]
            if place is None:
                continue
            strength = Strength(level[:, step], sign[:, step], op.ranges)
            expected = float(space[name][0][place])
            mine = {
                "Rotate": lambda s: s.signed(30.0),
                "ShearY": lambda s: s.signed(0.3),
                "TranslateX": lambda s: s.shift(40),
                "TranslateY": lambda s: s.shift(56),
                "Posterize": lambda s: s.bits(),
                "Solarize": lambda s: 255.0 - s.level * 25.5,
            }.get(name, lambda s: s.factor() - 1.0)
            assert float(mine(strength)) == pytest.approx(expected, abs=1e-4), (name, place)


def test_each_operation_of_a_policy_is_done_with_its_own_probability() -> None:
    count = 60_000
    op = AutoAugment()
    u = uniforms(count, op.draws)
    operation, _, _ = op.parameters(u)
    pair = (u[:, 0] * len(op.policy)).long()
    for row, steps in enumerate(op.policy):
        mine = operation[pair == row] < len(OPERATIONS)
        for step, (_, p, _) in enumerate(steps):
            error = math.sqrt(max(p * (1 - p), 1e-9) / len(mine))
            assert abs(mine[:, step].float().mean() - p) <= 5 * error, (row, step)


# --- draws


def uniforms(count: int, draws: int, seed: int = 0) -> Tensor:
    return torch.rand(count, draws, generator=torch.Generator().manual_seed(seed))


def test_operations_are_drawn_alike_and_done_with_their_probability() -> None:
    count = 30_000
    op = RandAugment(num_ops=2, p=0.4)
    operation, _, _ = op.parameters(uniforms(count, op.draws))
    for step in range(2):
        drawn = torch.bincount(operation[:, step], minlength=16).float()
        share = torch.tensor([0.4 / 15] * 15 + [0.6])
        deviation = (count * share * (1 - share)).sqrt()
        assert ((drawn - count * share).abs() < 5 * deviation).all()
    done = operation < 15
    both = done.all(1).float().mean()  # the two steps are drawn apart
    assert abs(both - 0.16) < 5 * math.sqrt(0.16 * 0.84 / count)


def test_strengths_are_normal_cut_at_the_ends_of_the_scale() -> None:
    count = 40_000
    op = RandAugment(num_ops=1)
    _, level, sign = op.parameters(uniforms(count, 4))
    assert level.max() == 10
    # 10 is two deviations above 9.
    assert abs((level == 10).float().mean() - 0.02275) < 5 * math.sqrt(0.02275 / count)
    inner = (level < 9.5).float().mean()
    assert abs(inner - 0.84134) < 5 * math.sqrt(0.134 / count)
    assert abs((level < 8.5).float().mean() - 0.15866) < 5 * math.sqrt(0.134 / count)
    assert set(sign.unique().tolist()) == {-1.0, 1.0}
    assert abs(sign.mean()) < 5 / math.sqrt(count)


def test_extreme_uniforms_give_finite_levels() -> None:
    u = torch.stack([torch.zeros(8), torch.full((8,), 1 - 2**-24)])
    for std in (0.0, 0.5):
        operation, level, _ = RandAugment(magnitude_std=std).parameters(u)
        assert operation.tolist() == [[0, 0], [15, 15]]
        assert torch.isfinite(level).all()


def test_p_zero_changes_nothing_and_the_input_stays() -> None:
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    sizes = torch.tensor([16, 16]).expand(4, 2)
    u = uniforms(4, 8)
    assert torch.equal(RandAugment(p=0.0)(x, sizes, u, 16), x)
    assert not torch.equal(RandAugment(p=1.0)(x, sizes, u, 16), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("num_ops", [1, 2, 3])
def test_an_image_is_augmented_alike_in_any_batch(num_ops: int) -> None:
    count = 120
    op = RandAugment(num_ops=num_ops, p=0.9)
    x = torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([24, 24]).expand(count, 2)
    u = uniforms(count, op.draws)
    assert len(op.parameters(u)[0].unique()) == 16  # every operation, and none
    together = op(x, sizes, u, 24)
    for parts in ([1] * count, [7, 13, 100]):
        pieces = [op(*part, 24) for part in zip(x.split(parts), sizes.split(parts), u.split(parts))]
        assert torch.equal(torch.cat(pieces), together)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert torch.equal(op(x[order], sizes, u[order], 24), together[order])


def test_two_steps_are_timm_s_two_operations_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All pairs of colour operations, at strengths drawn as timm draws them."""
    op = RandAugment(p=1.0)
    pairs = [(a, b) for a in COLOUR for b in COLOUR]
    count = len(OPERATIONS)
    places = torch.tensor([[OPERATIONS.index(a), OPERATIONS.index(b)] for a, b in pairs])
    u = uniforms(len(pairs), 8).view(-1, 2, 4)
    u[..., 0] = (places + 0.5) / count
    u[..., 2] = u[..., 2] * 0.9  # below 10, where Pillow refuses to posterise
    u = u.view(-1, 8)
    _, level, sign = op.parameters(u)
    source = pictures()[0]
    found = ours([source] * len(pairs), op, u)
    for row, pair in enumerate(pairs):
        image = Image.fromarray(source)
        for step, name in enumerate(pair):
            at = fixed(float(level[row, step]))
            image = timm_op(name, at, int(sign[row, step]), monkeypatch)(image)
        apart = np.abs(found[row] - np.asarray(image).astype(int))
        assert apart.max() <= 1, pair
        # Auto-contrast divides: PIL's double falls below some quotients that are whole.
        assert (apart > 0).mean() < (0.05 if "auto_contrast" in pair else 0.002), pair


def test_nothing_is_taken_from_a_global_generator() -> None:
    op = RandAugment(p=1.0)
    x, u = torch.rand(8, 3, 16, 16), uniforms(8, 8)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    op(x, torch.tensor([16, 16]).expand(8, 2), u, 16)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
