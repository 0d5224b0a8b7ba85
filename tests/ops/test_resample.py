"""Cropping and resizing against torchvision's antialiased `resized_crop`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vlx.ops.resample import Interpolation, crop_resize, filter_matrix

MODES = {
    Interpolation.bilinear: InterpolationMode.BILINEAR,
    Interpolation.bicubic: InterpolationMode.BICUBIC,
}
BOXES = [
    (0, 0, 40, 56),  # all of it
    (3, 5, 21, 30),  # smaller and larger than the output
    (10, 0, 8, 56),  # very wide
    (0, 20, 40, 6),  # very tall
    (39, 55, 1, 1),  # one pixel
    (7, 9, 24, 24),  # exactly the output
]


def images(count: int = len(BOXES)) -> Tensor:
    return torch.rand(count, 3, 40, 56, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", list(Interpolation))
@pytest.mark.parametrize("size", [(24, 24), (16, 33), (64, 64)])
def test_crop_resize_equals_torchvision(mode: Interpolation, size: tuple[int, int]) -> None:
    x = images()
    ours = crop_resize(x, torch.tensor(BOXES), size, mode)
    for i, (top, left, height, width) in enumerate(BOXES):
        theirs = F.resized_crop(
            x[i], top, left, height, width, list(size), MODES[mode], antialias=True
        )
        torch.testing.assert_close(ours[i], theirs.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", list(Interpolation))
def test_the_whole_image_at_its_own_size_is_itself(mode: Interpolation) -> None:
    x = images(2)
    boxes = torch.tensor([[0, 0, 40, 56]] * 2)
    torch.testing.assert_close(crop_resize(x, boxes, (40, 56), mode), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", list(Interpolation))
def test_a_constant_stays_constant(mode: Interpolation) -> None:
    x = torch.full((1, 3, 30, 30), 0.37)
    out = crop_resize(x, torch.tensor([[2.5, 3.5, 20.0, 11.0]]), (17, 13), mode)
    torch.testing.assert_close(out, torch.full_like(out, 0.37), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", list(Interpolation))
def test_weights_are_normalised_and_zero_outside_the_box(mode: Interpolation) -> None:
    matrix = filter_matrix(torch.tensor([4.0]), torch.tensor([10.0]), 30, 7, mode)[0]
    torch.testing.assert_close(matrix.sum(1), torch.ones(7))
    assert (matrix[:, :4] == 0).all()
    assert (matrix[:, 14:] == 0).all()


@pytest.mark.parametrize("mode", list(Interpolation))
def test_an_image_is_resized_alike_alone_and_in_a_batch(mode: Interpolation) -> None:
    x, boxes = images(), torch.tensor(BOXES)
    together = crop_resize(x, boxes, (24, 24), mode)
    for i in range(len(x)):
        alone = crop_resize(x[i : i + 1], boxes[i : i + 1], (24, 24), mode)
        assert torch.equal(alone[0], together[i])


def test_padding_beside_an_image_does_not_enter_it() -> None:
    x = images(1)
    canvas = torch.ones(1, 3, 80, 90)
    canvas[:, :, :40, :56] = x
    box = torch.tensor([[0, 0, 40, 56]])
    inside = crop_resize(canvas, box, (24, 24), Interpolation.bicubic)
    plain = crop_resize(x, box, (24, 24), Interpolation.bicubic)
    torch.testing.assert_close(inside, plain, rtol=0, atol=1e-5)


def test_bicubic_does_not_leave_the_range_of_images() -> None:
    x = (images(1) > 0.5).float()
    out = crop_resize(x, torch.tensor([[0, 0, 20, 20]]), (64, 64), Interpolation.bicubic)
    assert out.min() >= 0
    assert out.max() <= 1
