"""The device's half: uint8 batches to augmented float views, every sample by its own draws."""

from __future__ import annotations

import torch
from torch import Tensor

from vlx.core import random
from vlx.core.fields import Batch, Needs, ViewSpec
from vlx.ops.augment import CenterCrop


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
    source: Tensor | None = None
    for view in views:
        if view.of in made:
            x = made[view.of]
            extent = torch.tensor(x.shape[-2:], device=x.device).expand(x.shape[0], 2)
        else:
            source = to_float(images) if source is None else source
            x, extent = source, sizes
        view_keys = random.key(keys, view.name)
        for position, op in enumerate(view.ops):
            u = random.uniform(random.key(view_keys, position), op.draws)
            x = op(x, extent, u, view.size or size)
            extent = torch.tensor(x.shape[-2:], device=x.device).expand(x.shape[0], 2)
        made[view.name] = x
    return {view.name: made[view.name] for view in views if view.keep}


def evaluation_view(crop_ratio: float) -> Needs:
    """The deterministic view that evaluators see: a central square, bicubic."""
    return Needs(views=(ViewSpec("image", ops=(CenterCrop(ratio=crop_ratio),)),))
