"""Destroying connected rectangles of an image (GMML, SiT), batched on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlx.core.errors import ConfigError

DRAWS_PER_RECTANGLE = 4


class Rectangles(NamedTuple):
    """K rectangles of each sample in pixels, in the order in which they are painted."""

    top: Tensor
    """(B, K) int64, as the three below."""
    left: Tensor
    height: Tensor
    width: Tensor


def draw_rectangles(u: Tensor, size: int, *, align: int, largest: float) -> Rectangles:
    """Rectangles whose corners and sides are multiples of `align` pixels (GMML's code).

    u: (B, 4 K) uniforms; size: side of the square image in pixels; largest: upper bound of a
    rectangle's side as a share of `size`, exclusive. Raises `ConfigError` when no side fits.
    """
    bound = int(largest * size)
    if not 1 <= align < bound:
        raise ConfigError(
            f"method.align={align} must be at least 1 and below int(method.block_max x image "
            f"side) = {bound}: lower align or raise method.block_max"
        )
    rows, columns, heights, widths = u.reshape(len(u), DRAWS_PER_RECTANGLE, -1).unbind(1)

    def place(v: Tensor) -> Tensor:
        return (v * (size - align)).long() // align * align

    def side(v: Tensor, start: Tensor) -> Tensor:
        drawn = torch.minimum(align + (v * (bound - align)).long(), size - start)
        return (drawn / align).round().long() * align  # round half to even, as Python does

    top, left = place(rows), place(columns)
    return Rectangles(top, left, side(heights, top), side(widths, left))


def first_cover(rectangles: Rectangles, size: int) -> Tensor:
    """`(B, size, size)` int16: number of the first rectangle over each pixel, K where none is."""
    places = torch.arange(size, device=rectangles.top.device)

    def spans(start: Tensor, length: Tensor) -> Tensor:
        inside = places >= start[..., None]
        return inside & (places < (start + length)[..., None])  # (B, K, size)

    rows = spans(rectangles.top, rectangles.height)
    columns = spans(rectangles.left, rectangles.width)
    batch, count = rectangles.top.shape
    first = torch.full((batch, size, size), count, device=places.device, dtype=torch.int16)
    for number in reversed(range(count)):  # the lowest number is written last
        inside = rows[:, number, :, None] & columns[:, number, None, :]
        first.masked_fill_(inside, number)
    return first


def cover_area(first: Tensor, count: int, area: Tensor) -> Tensor:
    """`(B, 1, H, W)` bool: the union of the leading rectangles that reaches `area (B,)` pixels.

    Rectangles are taken until their union covers at least `area`, or all `count` of them.
    """
    covered = torch.zeros(len(first), count + 1, device=first.device)
    ones = torch.ones((), device=first.device).expand(first.shape).flatten(1)
    covered = covered.scatter_add(1, first.flatten(1).long(), ones)[:, :count].cumsum(1)
    used = (covered < area[:, None]).sum(1, keepdim=True)  # number of the last one that counts
    return (first <= used.clamp(max=count - 1)[..., None])[:, None]


def union_mask(u: Tensor, area_share: Tensor, size: int, *, align: int, largest: float) -> Tensor:
    """`(B, 1, size, size)` bool mask of rectangles over at least `area_share (B,)` of the image.

    u: (B, 4 K) uniforms, K rectangles at most (a share near 1 would need very many).
    """
    rectangles = draw_rectangles(u, size, align=align, largest=largest)
    first = first_cover(rectangles, size)
    return cover_area(first, rectangles.top.shape[1], area_share * size * size)


Filler = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(clean (B, C, H, W), normal (B, C*H*W), u (B, 2)) to what is put into destroyed pixels."""


def noise_filler(clean: Tensor, normal: Tensor, u: Tensor) -> Tensor:
    """N(0, 1) in every value."""
    return normal.reshape(clean.shape).to(clean.dtype)


def zeros_filler(clean: Tensor, normal: Tensor, u: Tensor) -> Tensor:
    """Zero: the mean colour of a normalised image."""
    return torch.zeros_like(clean)


def shift_filler(clean: Tensor, normal: Tensor, u: Tensor) -> Tensor:
    """The same image moved by a random distance, wrapped around: other places of itself."""
    height, width = clean.shape[-2:]
    # At least one pixel away, so that nothing is filled with itself.
    down = 1 + (u[:, 0] * (height - 1)).long()
    right = 1 + (u[:, 1] * (width - 1)).long()
    rows = (torch.arange(height, device=clean.device) + down[:, None]) % height  # (B, H)
    columns = (torch.arange(width, device=clean.device) + right[:, None]) % width  # (B, W)
    samples = torch.arange(len(clean), device=clean.device)
    moved = clean.permute(0, 2, 3, 1)[samples[:, None, None], rows[..., None], columns[:, None]]
    return moved.permute(0, 3, 1, 2)


def group_partner(u: Tensor, offset: int, group: int) -> Tensor:
    """`(B,)` position of another sample of each sample's own group of neighbours in the batch.

    u: (B,) uniforms; offset: position of the first sample in the global batch. A batch is a random
    order of the data, so a group of neighbours is a random draw of it; and a batch that is split
    over processes at multiples of `group` gives the same partners as the whole.
    """
    position = torch.arange(len(u), device=u.device)
    within = (position + offset) % group
    other = (within + 1 + (u * (group - 1)).long()) % group
    return (position - within + other) % len(u)
