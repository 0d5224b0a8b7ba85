"""What masked models predict."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PatchStatistics(NamedTuple):
    """Mean and standard deviation of each patch, `(B, N, 1)` both."""

    mean: Tensor
    std: Tensor


def patch_statistics(patches: Tensor) -> PatchStatistics:
    """Over all values of a patch `(B, N, P)`; unbiased variance, 1e-6 added (MAE's code)."""
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return PatchStatistics(mean, (variance + 1e-6).sqrt())


def norm_pix(patches: Tensor) -> Tensor:
    """Each patch with its own mean removed and its own deviation divided out (MAE, sec. 4.1)."""
    statistics = patch_statistics(patches)
    return (patches - statistics.mean) / statistics.std


def undo_norm_pix(pred: Tensor, patches: Tensor) -> Tensor:
    """Predictions of `norm_pix(patches)` as pixels, at each patch's own mean and deviation."""
    statistics = patch_statistics(patches)
    return pred * statistics.std + statistics.mean


def masked_patch_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over hidden patches of the mean squared error per patch (MAE, sec. 3).

    pred, target: (B, N, P); mask: (B, N), True = hidden. Divides by the hidden patches of the
    whole batch.
    """
    per_patch = (pred - target).square().mean(dim=-1)
    weights = mask.to(per_patch.dtype)
    return (per_patch * weights).sum() / weights.sum()


def masked_l1(pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`(B,)` summed absolute error of every sample where `mask`, and how many values that are.

    pred, target: (B, C, H, W); mask: bool, broadcast to them.
    """
    counted = mask.expand_as(target).to(target.dtype)
    error = (pred - target).abs() * counted
    return error.flatten(1).sum(1), counted.flatten(1).sum(1)
