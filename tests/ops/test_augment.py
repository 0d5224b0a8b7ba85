"""View operations against torchvision's functions with the same parameters."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop
from torchvision.transforms.v2 import functional as F

from vlx.data.host import collate
from vlx.data.views import evaluation_view, to_float
from vlx.ops.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    OneOf,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    Solarize,
    Squeeze,
)
from vlx.ops.resample import Interpolation

OPS = [
    RandomResizedCrop(),
    RandomCrop(4),
    HorizontalFlip(),
    CenterCrop(),
    ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
    GaussianBlur(),
    Grayscale(p=0.5),
    Solarize(p=0.5),
    Squeeze(),
    OneOf((Grayscale(1.0), Solarize(1.0), GaussianBlur(p=1.0))),
]
BATCH = 6


def images(count: int = BATCH, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def sizes_of(x: Tensor) -> Tensor:
    return torch.tensor(x.shape[-2:]).expand(len(x), 2)


def uniforms(count: int, draws: int, seed: int = 0) -> Tensor:
    return torch.rand(count, draws, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("op", [*OPS, RandomErasing(p=0.7)], ids=lambda op: type(op).__name__)
def test_an_image_gets_the_same_view_alone_and_in_a_batch(op) -> None:
    x, u = images(), uniforms(BATCH, op.draws)
    together = op(x, sizes_of(x), u, 24)
    for i in range(BATCH):
        one = slice(i, i + 1)
        assert torch.equal(op(x[one], sizes_of(x)[one], u[one], 24)[0], together[i])


@pytest.mark.parametrize("op", OPS, ids=lambda op: type(op).__name__)
def test_images_stay_in_range_and_inputs_unchanged(op) -> None:
    x = images()
    before = x.clone()
    out = op(x, sizes_of(x), uniforms(BATCH, op.draws), 24)
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6
    assert torch.equal(x, before)


# --- crops


@pytest.mark.parametrize("size", [(40, 60), (7, 90), (224, 224), (1, 1)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (1.0, 1.0)])
def test_boxes_lie_inside_the_image_in_whole_pixels(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    draws = RandomResizedCrop().draws
    rim = [torch.zeros(1, draws), torch.full((1, draws), 1 - 2**-24)]
    u = torch.cat([uniforms(2000, draws), *rim])
    sizes = torch.tensor(size).expand(len(u), 2)
    boxes = RandomResizedCrop(scale=scale).boxes(sizes, u)
    assert torch.equal(boxes, boxes.round())
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()


def test_boxes_have_the_area_and_ratio_asked_for() -> None:
    sizes = torch.tensor([1000, 1000]).expand(5000, 2)
    crop = RandomResizedCrop(scale=(0.1, 0.5))
    _, _, height, width = crop.boxes(sizes, uniforms(5000, crop.draws)).unbind(1)
    share = height * width / 1e6
    assert share.min() > 0.1 - 2e-3  # rounding to whole pixels
    assert share.max() < 0.5 + 2e-3
    assert abs(share.mean() - 0.3) < 5 * 0.4 / math.sqrt(12 * 5000)
    ratio = width / height
    assert ratio.min() > 3 / 4 - 0.01
    assert ratio.max() < 4 / 3 + 0.01
    assert abs(ratio.log().mean()) < 0.02


SHAPES = [(224, 224), (375, 500), (500, 375), (480, 640), (100, 900)]
SCALES = [(0.08, 1.0), (0.2, 1.0), (0.9, 1.0), (0.05, 0.4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_boxes_are_distributed_as_torchvision_s(
    shape: tuple[int, int], scale: tuple[float, float]
) -> None:
    """Area, ratio, place and the share of boxes that span a whole side."""
    count = 3000
    image = torch.empty(1, *shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [
            TorchvisionCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)
        ]
    theirs = torch.tensor(drawn, dtype=torch.float64)
    crop = RandomResizedCrop(scale=scale)
    sizes = torch.tensor(shape).expand(count, 2)
    ours = crop.boxes(sizes, uniforms(count, crop.draws)).double()

    def facts(boxes: Tensor) -> dict[str, Tensor]:
        top, left, height, width = boxes.unbind(1)
        whole = (height == shape[0]) | (width == shape[1])
        return {
            "area": height * width,
            "ratio": width / height,
            "top": top,
            "left": left,
            "whole": whole.double(),
        }

    for (name, mine), other in zip(facts(ours).items(), facts(theirs).values()):
        # Kolmogorov and Smirnov's two-sample distance, its bound at p = 0.001.
        at = torch.cat([mine, other]).unique()
        ranks = [torch.searchsorted(v.sort()[0], at, right=True) / count for v in (mine, other)]
        assert (ranks[0] - ranks[1]).abs().max() < 1.95 * math.sqrt(2 / count), name


def test_an_image_that_no_box_fits_gives_torchvision_s_central_box() -> None:
    shapes = [(100, 900), (900, 100), (10, 21), (300, 200), (64, 64), (31, 40)]
    crop = RandomResizedCrop(scale=(3.0, 3.0))  # larger than any image
    ours = crop.boxes(torch.tensor(shapes), uniforms(len(shapes), crop.draws))
    for box, shape in zip(ours.tolist(), shapes):
        expected = TorchvisionCrop.get_params(torch.empty(1, *shape), [3.0, 3.0], [3 / 4, 4 / 3])
        assert box == list(expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("padding", "size"), [(4, 32), (0, 24), (3, 20), (8, 48), (2, 50)])
def test_random_crop_equals_pad_and_crop(dtype: torch.dtype, padding: int, size: int) -> None:
    x = (images() * 255).to(dtype)
    op = RandomCrop(padding)
    u = uniforms(BATCH, 2)
    out = op(x, sizes_of(x), u, size)
    assert out.shape == (BATCH, 3, size, size)
    assert out.dtype == dtype
    for i, (top, left) in enumerate(op.offsets(sizes_of(x), u, size).tolist()):
        padded = F.pad(x[i], [padding] * 4)
        expected = F.crop(padded, top, left, size, size)  # zeros where it runs over
        assert torch.equal(out[i], expected)


def test_random_crop_reaches_every_offset_alike() -> None:
    sizes = torch.tensor([32, 32]).expand(9000, 2)
    offsets = RandomCrop(4).offsets(sizes, uniforms(9000, 2), 32)
    for column in range(2):
        counts = torch.bincount(offsets[:, column], minlength=9)
        assert len(counts) == 9
        assert ((counts - 1000).abs() < 5 * math.sqrt(1000)).all()
    edge = RandomCrop(4).offsets(sizes[:1], torch.full((1, 2), 1 - 2**-24), 32)
    assert edge.tolist() == [[8, 8]]


def test_center_crop_is_the_central_square() -> None:
    x = images(2, 40, 60)
    out = CenterCrop(ratio=0.5)(x, sizes_of(x), uniforms(2, 0), 20)
    torch.testing.assert_close(out, x[:, :, 10:30, 20:40], rtol=0, atol=1e-6)


def photos() -> list[np.ndarray]:
    """(H, W, 3) uint8 of several shapes: smooth, with some noise."""
    random = np.random.default_rng(0)
    made = []
    for height, width in ((75, 50), (40, 61), (33, 33), (300, 200), (20, 90)):
        y, x = np.mgrid[:height, :width] / 20
        waves = np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(x * y / 9)], axis=2)
        made.append((waves * 90 + 128 + random.normal(0, 9, waves.shape)).clip(0, 255).astype("u1"))
    return made


@pytest.mark.parametrize("mode", list(Interpolation))
@pytest.mark.parametrize("size", [16, 48])
def test_the_squeezed_view_is_timm_s(mode: Interpolation, size: int) -> None:
    """Of PIL's images, which round to levels between the two directions; in one padded batch."""
    from timm.data import create_transform

    theirs = create_transform(
        (3, size, size),
        interpolation=mode.name,
        crop_pct=1.0,
        crop_mode="squash",
        normalize=False,
    )
    (view,) = evaluation_view(squeeze=True, interpolation=mode).views
    host = collate(photos(), [0] * 5, range(5), [], None)
    out = view.ops[0](to_float(host.images), host.sizes, uniforms(5, 0), size)
    for mine, photo in zip(out, photos()):
        wanted = torch.as_tensor(theirs(Image.fromarray(photo))).float() / 255
        assert (mine - wanted).abs().max() < 1.6 / 255


@pytest.mark.parametrize("mode", list(Interpolation))
def test_squeezed_is_torchvision_s_antialiased_resize(mode: Interpolation) -> None:
    for photo in photos():
        x = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
        out = Squeeze(mode)(x, sizes_of(x), uniforms(1, 0), 32)
        filters = {Interpolation.bilinear: F.InterpolationMode.BILINEAR}
        filters[Interpolation.bicubic] = F.InterpolationMode.BICUBIC
        wanted = F.resize(x, [32, 32], interpolation=filters[mode], antialias=True)
        torch.testing.assert_close(out, wanted.clamp(0, 1), rtol=0, atol=2e-6)


# --- flips


def test_flip_equals_torchvision_and_has_its_probability() -> None:
    x = images(400, 4, 4)
    u = uniforms(400, 1)
    out = HorizontalFlip(0.3)(x, sizes_of(x), u, 4)
    flipped = u[:, 0] < 0.3
    assert torch.equal(out[flipped], F.horizontal_flip(x[flipped]))
    assert torch.equal(out[~flipped], x[~flipped])
    assert abs(flipped.float().mean() - 0.3) < 5 * math.sqrt(0.21 / 400)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_flip_never_and_always(p: float) -> None:
    x = images()
    u = torch.full((BATCH, 1), 1 - 2**-24)
    expected = x if p == 0 else x.flip(-1)
    assert torch.equal(HorizontalFlip(p)(x, sizes_of(x), u, 32), expected)


# --- blur


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_equals_torchvision_with_the_same_sigma(sigma: float) -> None:
    x = images(2)
    op = GaussianBlur(sigma=(0.0, 2.0), p=1.0)
    u = torch.tensor([[sigma / 2.0, 0.0]]).expand(2, 2)
    theirs = F.gaussian_blur(x, [13, 13], [sigma, sigma])  # 3 deviations each way at sigma 2
    torch.testing.assert_close(op(x, sizes_of(x), u, 32), theirs, rtol=0, atol=1e-5)


def test_blur_keeps_what_its_probability_leaves() -> None:
    x = images(2)
    u = torch.tensor([[0.5, 0.49], [0.5, 0.5]])
    out = GaussianBlur(p=0.5)(x, sizes_of(x), u, 32)
    assert not torch.equal(out[0], x[0])
    assert torch.equal(out[1], x[1])


def test_blur_of_an_image_smaller_than_its_kernel() -> None:
    x = images(2, 5, 5)
    out = GaussianBlur(p=1.0)(x, sizes_of(x), uniforms(2, 2), 5)
    assert torch.isfinite(out).all()


# --- colour


def jitter_with(**factors: float) -> tuple[ColorJitter, Tensor]:
    """An op and uniforms that draw exactly these factors (hue: a shift in turns)."""
    names = ("brightness", "contrast", "saturation", "hue")
    op = replace(ColorJitter(), **dict.fromkeys(factors, 0.5))
    centre = {"hue": 0.0}
    u = [0.5 + factors[n] - centre.get(n, 1.0) if n in factors else 0.5 for n in names]
    return op, torch.tensor([[*u, 0.0]]).expand(BATCH, 5)


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.4])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_colour_factors_equal_torchvision(kind: str, factor: float) -> None:
    x = images()
    op, u = jitter_with(**{kind: factor})
    theirs = getattr(F, f"adjust_{kind}")(x, factor)
    # torchvision's grey weights have four digits (0.2989, 0.587, 0.114), ours are the standard's
    # three: up to 1e-4 of the value apart.
    torch.testing.assert_close(op(x, sizes_of(x), u, 32), theirs, rtol=0, atol=2e-4)


def test_no_hue_shift_is_the_same_image() -> None:
    x = images()
    op, u = jitter_with(hue=0.0)
    torch.testing.assert_close(op(x, sizes_of(x), u, 32), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.03, 0.1, 0.3])
def test_hue_shift_equals_torchvision(shift: float) -> None:
    x = images()
    x[0] = 0.5  # grey
    x[1, :, :16] = torch.eye(3)[:, 0, None, None]  # pure red
    op, u = jitter_with(hue=shift)
    theirs = F.adjust_hue(x, shift)
    torch.testing.assert_close(op(x, sizes_of(x), u, 32), theirs, rtol=0, atol=1e-5)


def test_a_full_turn_of_hue_comes_back() -> None:
    x = images() * 0.5 + 0.25
    op = ColorJitter(hue=1.0)
    u = torch.tensor([[0.5, 0.5, 0.5, 1.0, 0.0]]).expand(BATCH, 5)
    torch.testing.assert_close(op(x, sizes_of(x), u, 32), x, rtol=0, atol=1e-4)


def test_jitter_keeps_what_its_probability_leaves() -> None:
    x = images(2)
    u = torch.tensor([[0.9] * 4 + [0.79], [0.9] * 4 + [0.8]])
    out = ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)(x, sizes_of(x), u, 32)
    assert not torch.equal(out[0], x[0])
    assert torch.equal(out[1], x[1])


def test_grey_equals_torchvision_where_it_is_drawn() -> None:
    x = images(2)
    out = Grayscale(p=0.1)(x, sizes_of(x), torch.tensor([[0.09], [0.1]]), 32)
    grey = F.rgb_to_grayscale(x[:1], num_output_channels=3)
    torch.testing.assert_close(out[:1], grey, rtol=0, atol=2e-4)
    assert torch.equal(out[1], x[1])


# --- erasing


def test_erasing_has_its_probability() -> None:
    op = RandomErasing(p=0.25)
    sizes = torch.tensor([224, 224]).expand(20_000, 2)
    erased = op.boxes(sizes, uniforms(20_000, op.draws))[:, 2] > 0
    assert abs(erased.float().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20_000)


@pytest.mark.parametrize(("p", "expected"), [(0.0, 0), (1.0, 500)])
def test_erasing_never_and_always(p: float, expected: int) -> None:
    op = RandomErasing(p=p)
    sizes = torch.tensor([224, 224]).expand(500, 2)
    assert (op.boxes(sizes, uniforms(500, op.draws))[:, 2] > 0).sum() == expected


def test_erased_boxes_lie_inside_and_have_the_area_and_ratio_asked_for() -> None:
    op = RandomErasing(p=1.0)
    u = torch.cat([uniforms(5000, op.draws), torch.zeros(1, op.draws)])
    u = torch.cat([u, torch.full((1, op.draws), 1 - 2**-24)])
    u[:, 0] = 0.0
    sizes = torch.tensor([600, 500]).expand(len(u), 2)
    top, left, height, width = op.boxes(sizes, u).unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 600).all()
    assert (left + width <= 500).all()
    assert (height[:5000] < 600).all()
    assert (width[:5000] < 500).all()
    share, ratio = (height * width / 3e5)[:5000], (height / width)[:5000]
    assert share.min() > 0.02 - 1e-3  # whole pixels
    assert share.max() < 1 / 3 + 1e-3
    # Large boxes that do not fit are drawn again, so the mean is a little below the middle.
    assert 0.17 < share.mean() < (0.02 + 1 / 3) / 2
    assert ratio.min() > 0.3 - 0.01
    assert ratio.max() < 1 / 0.3 + 0.1
    assert abs(ratio.log().mean()) < 0.05


def test_the_ratio_of_an_erased_box_is_height_over_width() -> None:
    op = RandomErasing(p=1.0, area=(0.02, 0.1), ratio=(2.0, 3.0))
    sizes = torch.tensor([400, 400]).expand(200, 2)
    _, _, height, width = op.boxes(sizes, uniforms(200, op.draws)).unbind(1)
    ratio = height / width
    assert ratio.min() > 2.0 - 0.05  # whole pixels
    assert ratio.max() < 3.0 + 0.05


def test_erased_boxes_are_distributed_as_timm_s() -> None:
    """Means of every number over many boxes, against timm's own loop."""
    from timm.data.random_erasing import RandomErasing as Theirs

    random.seed(0)
    count, h, w = 3000, 32, 24
    their_op = Theirs(probability=1.0, mode="const", max_area=1 / 3, device="cpu")
    found = []
    for _ in range(count):
        erased = their_op(torch.ones(1, h, w))[0] == 0
        rows, columns = erased.any(1).nonzero()[:, 0], erased.any(0).nonzero()[:, 0]
        found.append([rows[0], columns[0], len(rows), len(columns)])
    theirs = torch.tensor(found, dtype=torch.float64)
    op = RandomErasing(p=1.0)
    ours = op.boxes(torch.tensor([h, w]).expand(count, 2), uniforms(count, op.draws)).double()
    for mine, other in ((ours, theirs), (ours**2, theirs**2)):
        error = ((mine.var(0) + other.var(0)) / count).sqrt()
        assert ((mine.mean(0) - other.mean(0)).abs() < 5 * error).all()


def test_one_colour_of_any_ratio_as_zhong_s_code_draws_it() -> None:
    """Sides of a box of area U(2 %, 40 %) and ratio U(0.3, 1 / 0.3), the first of ten that fits."""
    op = RandomErasing(p=1.0, area=(0.02, 0.4), log_ratio=False, fill=(0.2, 0.5, 0.7))
    count, side = 20_000, 1000
    generator = np.random.default_rng(0)
    area = side**2 * generator.uniform(0.02, 0.4, (count, 10))
    ratio = generator.uniform(0.3, 1 / 0.3, (count, 10))
    sides = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], -1).round()
    first = (sides < side).all(-1).argmax(1)
    expected = torch.from_numpy(sides[np.arange(count), first])
    drawn = op.boxes(torch.full((count, 2), side), uniforms(count, op.draws))[:, 2:].double()
    for mine, other in ((drawn, expected), (drawn**2, expected**2)):
        error = ((mine.var(0) + other.var(0)) / count).sqrt()
        assert ((mine.mean(0) - other.mean(0)).abs() < 5 * error).all()
    x = images(8, 24, 24)
    u = uniforms(8, op.draws)
    out = op(x, sizes_of(x), u, 24)
    for i, (top, left, height, width) in enumerate(op.boxes(sizes_of(x), u).tolist()):
        box = (slice(None), slice(top, top + height), slice(left, left + width))
        expected_image = x[i].clone()
        expected_image[box] = torch.tensor([0.2, 0.5, 0.7])[:, None, None]
        assert torch.equal(out[i], expected_image)


def test_a_box_that_never_fits_erases_nothing() -> None:
    op = RandomErasing(p=1.0, area=(0.99, 1.0), ratio=(1.0, 1.0))
    x = images(4, 8, 8)
    assert torch.equal(op(x, sizes_of(x), uniforms(4, op.draws), 8), x)


def test_the_first_of_ten_draws_that_fits_counts() -> None:
    op = RandomErasing(p=1.0, area=(0.0, 1.0), ratio=(1.0, 1.0))
    u = torch.zeros(1, op.draws)
    u[0, 5:15] = torch.tensor([1 - 2**-24] * 3 + [0.25, 0.64] + [0.01] * 5)
    assert op.boxes(torch.tensor([[100, 100]]), u).tolist() == [[0, 0, 50, 50]]


def test_erased_pixels_are_standard_normal_after_normalisation_and_others_stay() -> None:
    x = images(64, 64, 64)
    op = RandomErasing(p=0.5)
    u = uniforms(64, op.draws)
    out = op(x, sizes_of(x), u, 64)
    inside = torch.zeros(64, 64, 64, dtype=torch.bool)
    for i, (top, left, height, width) in enumerate(op.boxes(sizes_of(x), u).tolist()):
        inside[i, top : top + height, left : left + width] = True
    assert 0 < inside.any((1, 2)).sum() < 64
    assert torch.equal((out != x).any(1), inside)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    noise = ((out - mean) / std).permute(1, 0, 2, 3)[:, inside]  # (3, P)
    count = noise.shape[1]
    assert count > 10_000
    assert (noise.mean(1).abs() < 5 / math.sqrt(count)).all()
    assert ((noise.var(1) - 1).abs() < 5 * math.sqrt(2 / count)).all()
    assert ((noise**4).mean(1) - 3).abs().max() < 5 * math.sqrt(96 / count)
    between = torch.corrcoef(noise) - torch.eye(3)  # channels have their own
    assert between.abs().max() < 5 / math.sqrt(count)


def test_noise_belongs_to_the_sample_and_its_uniforms() -> None:
    x = torch.zeros(3, 3, 32, 32)
    op = RandomErasing(p=1.0)
    u = uniforms(1, op.draws).repeat(3, 1)
    u[2, 4] += 2**-10  # another draw of the noise alone
    out = op(x, sizes_of(x), u, 32)
    assert torch.equal(out[0], out[1])
    box = out[0] != 0
    assert torch.equal(box, out[2] != 0)
    assert (out[0][box] != out[2][box]).float().mean() > 0.99
    state = torch.get_rng_state()
    assert torch.equal(op(x, sizes_of(x), u, 32), out)
    assert torch.equal(torch.get_rng_state(), state)
    rows = out[0, :, box[0].any(1)]
    assert not torch.equal(rows[:, 0], rows[:, 1])  # a pixel's noise is its own


def test_solarising_inverts_what_pillow_inverts() -> None:
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 256, 256)
    found = Solarize(p=1.0)(levels / 255.0, sizes_of(levels), torch.zeros(1, 1), 256)
    expected = F.solarize(levels, threshold=128) / 255.0
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_one_of_gives_each_sample_exactly_one_result_with_equal_chances() -> None:
    ops = (Grayscale(1.0), Solarize(1.0), GaussianBlur(p=1.0))
    choice = OneOf(ops)
    assert choice.draws == 1 + sum(op.draws for op in ops)
    x = images(300, 8, 8)
    u = uniforms(300, choice.draws)
    found = choice(x, sizes_of(x), u, 8)
    own = u[:, 1:].split([op.draws for op in ops], dim=1)
    results = [op(x, sizes_of(x), part, 8) for op, part in zip(ops, own)]
    same = torch.stack([(found == result).all(dim=(1, 2, 3)) for result in results], dim=1)
    assert (same.sum(1) == 1).all()
    assert (same.sum(0) > 80).all()
