"""Points in boxes and boxes that move, against loops and hand-worked cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vlx.ops.regions import (
    encode_boxes,
    grid_boxes,
    moved_boxes,
    points_in_boxes,
    sample_points,
)


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_points_have_mean_zero_and_a_third_of_deviation_in_units_of_the_box() -> None:
    corner, side = drawn(2, 3, 2) * 0.4, drawn(2, 3, 2) * 0.5 + 0.1
    boxes = torch.cat([corner, corner + side], dim=-1)
    points = points_in_boxes(boxes, torch.randn(2, 3, 16, 2))
    relative = (points - (corner + side / 2).unsqueeze(2)) / side.unsqueeze(2)
    torch.testing.assert_close(relative.mean(2), torch.zeros(2, 3, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(relative.std(2), torch.full((2, 3, 2), 1 / 3), atol=1e-4, rtol=0)


def test_a_map_is_read_between_its_pixels_and_continues_outside() -> None:
    ramp = torch.arange(8.0).expand(1, 1, 4, 8)  # its value is the column
    at = torch.tensor([[0.5 / 8, 0.5], [3.0 / 8, 0.2], [7.5 / 8, 0.9], [-1.0, 0.5], [2.0, 3.0]])
    found = sample_points(ramp, at.view(1, 1, 5, 2))
    assert found.flatten().tolist() == pytest.approx([0.0, 2.5, 7.0, 0.0, 7.0], abs=1e-5)


def test_boxes_move_by_their_own_sides() -> None:
    box = torch.tensor([[[0.2, 0.1, 0.6, 0.3]]])
    same = moved_boxes(box, torch.zeros(1, 1, 4))
    torch.testing.assert_close(same, box)
    change = torch.tensor([[[0.5, -1.0, math.log(2.0), 0.0]]])
    expected = torch.tensor([[[0.2, -0.1, 1.0, 0.1]]])  # centre (0.6, 0), sides 0.8 and 0.2
    torch.testing.assert_close(moved_boxes(box, change), expected)


def test_the_encoding_is_a_loop_over_numbers_and_frequencies() -> None:
    boxes = drawn(2, 3, 4).requires_grad_()
    found = encode_boxes(boxes, 24)
    assert not found.requires_grad
    step = [math.exp(math.log(128) * i / 5) for i in range(6)]
    for number in range(4):
        angle = [math.pi * float(boxes[1, 2, number]) * f for f in step]
        expected = [math.sin(a) for a in angle[0::2]] + [math.cos(a) for a in angle[1::2]]
        part = found[1, 2, 6 * number : 6 * number + 6].tolist()
        assert part == pytest.approx(expected, abs=1e-4)


def test_boxes_fill_a_square_grid_and_the_rest_is_the_whole_image() -> None:
    boxes = grid_boxes(48)
    assert torch.equal(boxes[36:], torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(12, 4))
    torch.testing.assert_close(boxes[:36, 2:] - boxes[:36, :2], torch.full((36, 2), 0.5))
    assert len(boxes[:36].unique(dim=0)) == 36
    assert boxes.min() == 0
    assert boxes.max() == 1
