"""Which patches or pixels are hidden. Masks are True where hidden, everywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlx.core.errors import ConfigError


class RandomMask(NamedTuple):
    """A random split of N patches into kept and hidden ones."""

    keep: Tensor
    """(B, K) indices of the kept patches, in shuffled order."""
    restore: Tensor
    """(B, N): position of each patch in [kept..., hidden...]."""
    mask: Tensor
    """(B, N) bool, True = hidden, in the patches' own order."""


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """`int(N * (1 - mask_ratio))`, as MAE floors it; raises where nothing is kept or hidden."""
    kept = int(num_patches * (1 - mask_ratio))
    if not 0 < kept < num_patches:
        raise ConfigError(
            f"method.mask_ratio={mask_ratio} keeps {kept} of {num_patches} patches; at least one "
            "must be kept and one hidden. Change mask_ratio or encoder.patch_size"
        )
    return kept


def random_masking(noise: Tensor, mask_ratio: float) -> RandomMask:
    """Keep the patches with the smallest `noise (B, N)` (MAE, section 3)."""
    kept = num_kept(noise.shape[1], mask_ratio)
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return RandomMask(shuffle[:, :kept], restore, restore >= kept)


def batch_keep_indices(mask: Tensor, kept: int) -> Tensor:
    """Indices `(B, kept)` of the visible patches of `mask (B, N)`, in their own order."""
    return torch.argsort(mask.to(torch.uint8), dim=1, stable=True)[:, :kept]
