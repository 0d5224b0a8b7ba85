"""Adaptive polyphase anchoring (Ding et al. 2023): a map rolled so that an operation of some stride
does not mind where it was shifted to."""

from __future__ import annotations

import torch
from torch import Tensor

from vlx.core.errors import ConfigError
from vlx.ops.precision import without_autocast


def polyphase_anchor(x: Tensor, stride: int) -> Tensor:
    """Maps (B, C, H, W), each rolled so that the largest of its stride * stride phases comes first.

    A phase is every stride-th row and column from an offset; its size is the L2 norm over channels
    and places, the first of equals counts. What is given of a circularly shifted map differs by a
    shift of a multiple of the stride alone. Gradient flows through the roll, not the choice.
    Raises `ConfigError` where the stride does not divide the sides.
    """
    if stride == 1:
        return x
    height, width = x.shape[-2:]
    if height % stride or width % stride:
        raise ConfigError(
            f"polyphase anchoring by {stride} needs sides that it divides, got {height}x{width}: "
            "choose another encoder.image_size"
        )
    top, left = _largest_phase(x.detach(), stride)  # each (B,)
    rows = (torch.arange(height, device=x.device) + top[:, None]) % height  # (B, H)
    columns = (torch.arange(width, device=x.device) + left[:, None]) % width
    places = rows[:, :, None] * width + columns[:, None]  # (B, H, W)
    places = places.flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, places).view_as(x)


def _largest_phase(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Row and column, each (B,), of the phase with the largest norm."""
    with without_autocast(x):
        # float64: a shifted map is summed in another order, and near-ties must fall alike.
        power = x.double().square().sum(1)  # (B, H, W)
        power = power.unflatten(2, (-1, stride)).unflatten(1, (-1, stride)).sum((1, 3))
    phase = power.flatten(1).argmax(1)
    return phase // stride, phase % stride
