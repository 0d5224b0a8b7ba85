"""The device's half: uint8 batches to augmented float views, every sample by its own draws."""

from __future__ import annotations

import torch
from torch import Tensor

from vlx.core import random
from vlx.core.fields import Batch, Needs, ViewSpec
from vlx.ops.augment import CenterCrop, HorizontalFlip, RandomCrop, Squeeze
from vlx.ops.resample import Interpolation

# These only move pixels, so they run on uint8: a quarter of the memory traffic of float.
_PIXEL_MOVES = (RandomCrop, HorizontalFlip)


def to_float(images: Tensor) -> Tensor:
    """uint8 to float32 in 0..1."""
    return images.to(torch.float32).mul_(1.0 / 255.0)


def make_views(
    images: Tensor, sizes: Tensor, keys: Tensor, views: tuple[ViewSpec, ...], size: int
) -> Batch:
    """Every view of a batch.

    images: (B, 3, H, W) uint8, padded; sizes: (B, 2) true sizes; keys: (B,) one random key per
    sample; size: the side of views that name none.
    """
    made: Batch = {}
    as_float: Tensor | None = None
    for view in views:
        if view.of in made:
            x = made[view.of]
            extent = _extent(x)
        else:
            x, extent = images, sizes
        view_keys = random.key(keys, view.name)
        for position, op in enumerate(view.ops):
            if x is images and not isinstance(op, _PIXEL_MOVES):
                as_float = to_float(images) if as_float is None else as_float
                x = as_float
            elif x.dtype == torch.uint8 and not isinstance(op, _PIXEL_MOVES):
                x = to_float(x)
            u = random.uniform(random.key(view_keys, position), op.draws)
            x = op(x, extent, u, view.size or size)
            extent = _extent(x)
        made[view.name] = to_float(x) if x.dtype == torch.uint8 else x
    return {view.name: made[view.name] for view in views if view.keep}


def _extent(images: Tensor) -> Tensor:
    """(B, 2) height and width of images that fill their tensor."""
    return torch.tensor(images.shape[-2:], device=images.device).expand(len(images), 2)


def evaluation_view(
    crop_ratio: float = 1.0,
    *,
    squeeze: bool = False,
    interpolation: Interpolation = Interpolation.bicubic,
) -> Needs:
    """The deterministic view that evaluators see: a central square, or the whole image squeezed
    into one."""
    op = Squeeze(interpolation) if squeeze else CenterCrop(crop_ratio, interpolation)
    return Needs(views=(ViewSpec("image", ops=(op,)),))
