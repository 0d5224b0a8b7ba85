"""The distortions of 2021: grey, blur, noise and pieces of another image, in rectangles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlx.core.step import StepContext
from vlx.ops.corrupt import group_partner

LEAST, LARGEST, AREA = 0.05, 0.25, 0.3  # sides and area as shares of the image's
KERNEL, SIGMA = 15, (0.1, 5.1)  # pixels: the widest kernel, the blur's deviation
GROUP = 4


class Boxes(NamedTuple):
    """K rectangles of each sample in pixels, ends exclusive; `(B, K)` int64 all."""

    top: Tensor
    left: Tensor
    bottom: Tensor
    right: Tensor


def draw_boxes(u: Tensor, size: int, largest: int) -> Boxes:
    """Corners up to a least side from the rim, sides from the least to `largest`, exclusive, cut
    at the rim. u: (B, 4, K) uniforms."""
    least = max(1, int(LEAST * size))
    rows, columns, heights, widths = u.unbind(1)

    def span(start: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        begin = (start * (size - least)).long()
        length = least + (side * max(largest - least, 1)).long()
        return begin, (begin + length).clamp(max=size)

    (top, bottom), (left, right) = span(rows, heights), span(columns, widths)
    return Boxes(top, left, bottom, right)


def cover(boxes: Boxes, used: Tensor, size: int) -> Tensor:
    """`(B, 1, size, size)` bool: pixels in any of the boxes that are `used (B, K)`."""
    places = torch.arange(size, device=used.device)

    def inside(start: Tensor, end: Tensor) -> Tensor:
        return ((places >= start[..., None]) & (places < end[..., None])).float()  # (B, K, size)

    rows = inside(boxes.top, boxes.bottom) * used[..., None]
    return (rows.transpose(1, 2) @ inside(boxes.left, boxes.right) > 0)[:, None]


def until_area(boxes: Boxes, area: Tensor) -> Tensor:
    """`(B, K)` bool: boxes taken until their areas, overlaps counted twice, sum to `area (B,)`."""
    each = (boxes.bottom - boxes.top) * (boxes.right - boxes.left)
    before = each.cumsum(1) - each
    return before < area[:, None]


def blur_inside(images: Tensor, boxes: Boxes, kernels: Tensor) -> Tensor:
    """Each image's box blurred along rows and columns as if it were a picture of its own, its
    border reflected. boxes: one a sample; kernels: (B, 15), odd ones centred, that sum to 1."""
    for axis, start, end in ((2, boxes.top, boxes.bottom), (3, boxes.left, boxes.right)):
        places = torch.arange(images.shape[axis], device=images.device)[None]  # (1, H)
        shape = [-1, 1, 1, 1]
        shape[axis] = images.shape[axis]
        total = torch.zeros_like(images)
        for number, offset in enumerate(range(-(KERNEL // 2), KERNEL // 2 + 1)):
            index = places + offset
            index = start + (index - start).abs()
            index = (end - 1) - ((end - 1) - index).abs()
            index = torch.maximum(torch.minimum(index, end - 1), start)  # narrower than the kernel
            taken = images.gather(axis, index.view(shape).expand_as(images))
            total += kernels[:, number, None, None, None] * taken
        images = total
    return images


def draw_kernels(u: Tensor) -> Tensor:
    """`(B, 15)` Gaussians of an odd width from 3 to 15, zeros around. u: (B, 2) uniforms."""
    half = ((3 + (u[:, 0] * (KERNEL - 2)).long()) // 2)[:, None]  # of 3..15: 3 rarer, as there
    sigma = SIGMA[0] + u[:, 1:] * (SIGMA[1] - SIGMA[0])
    offsets = torch.arange(-(KERNEL // 2), KERNEL // 2 + 1, device=u.device)
    kernels = torch.exp(-0.5 * (offsets / sigma) ** 2) * (offsets.abs() <= half)
    return kernels / kernels.sum(1, keepdim=True)


def distort(clean: Tensor, ctx: StepContext, view: str, most: int) -> Tensor:
    """Distorted copies of normalised images (B, 3, H, H), each by draws of its own.

    In order: a box loses its colour, a box is blurred, boxes of noise and then of another image of
    the sample's group fill up to 30 % of the area each. most: boxes of a kind.
    """
    count, size = len(clean), clean.shape[-1]
    single = ctx.uniform(clean, 13, f"{view}/boxes")
    one = torch.ones(count, 1, dtype=torch.bool, device=clean.device)
    x = clean
    boxes = draw_boxes(single[:, :4, None], size, size)
    x = torch.where(cover(boxes, one, size), x.mean(1, keepdim=True), x)
    boxes = draw_boxes(single[:, 4:8, None], size, size)
    blurred = blur_inside(x, boxes, draw_kernels(single[:, 8:10]))
    x = torch.where(cover(boxes, one, size), blurred, x)

    def many(name: str, area: Tensor) -> Tensor:
        u = ctx.uniform(clean, 4 * most, f"{view}/{name}").unflatten(1, (4, most))
        drawn = draw_boxes(u, size, int(LARGEST * size))
        return cover(drawn, until_area(drawn, area * AREA * size * size), size)

    noise = ctx.normal(clean, clean[0].numel(), f"{view}/values").reshape(clean.shape)
    x = torch.where(many("noise", single[:, 10]), noise.to(x.dtype), x)
    partner = group_partner(single[:, 11], ctx.sample_offset, GROUP)
    before = partner < torch.arange(count, device=clean.device)  # images are distorted in turn
    alien = torch.where(before[:, None, None, None], x[partner], clean[partner])
    return torch.where(many("alien", single[:, 12]), alien, x)
