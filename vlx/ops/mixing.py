"""Mixup (Zhang 2018), CutMix (Yun 2019) and label smoothing, as timm's `Mixup` in mode "batch".

One draw for a step; a sample's partner is the one at the mirrored place of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """How the batch of one step is mixed."""

    lam: float = 1.0
    """Weight of a sample itself, 0..1; 1 leaves the batch as it is."""
    centre: tuple[float, float] | None = None
    """CutMix: centre of the box as shares [0, 1) of height and width. None is mixup."""

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, bottom, left, right in pixels: 1 - lam of the image, less what leaves it. CutMix."""
        assert self.centre is not None
        share = math.sqrt(1.0 - self.lam)
        (top, bottom), (left, right) = (
            _interval(int(at * side), int(side * share), side)
            for at, side in zip(self.centre, (height, width))
        )
        return top, bottom, left, right


def _interval(centre: int, length: int, side: int) -> tuple[int, int]:
    start, end = centre - length // 2, centre + (length + 1) // 2
    return max(start, 0), min(end, side)


@dataclass(frozen=True)
class Mixing:
    """Images and labels of a batch to mixed images and soft targets; DeiT's values."""

    mixup_alpha: float = 0.8
    """Both parameters of mixup's Beta distribution; 0 turns it off."""
    cutmix_alpha: float = 1.0
    """Both parameters of CutMix's Beta distribution; 0 turns it off."""
    p: float = 1.0
    """Probability that a step mixes at all."""
    switch_p: float = 0.5
    """Probability of CutMix where both are on."""
    smoothing: float = 0.1
    """Share of a target that is spread evenly over all classes, 0..1."""

    def draw(self, generator: np.random.Generator) -> Mixture:
        """What a step does. The generator is not torch's, so that no device is waited for."""
        done, switch, *centre = generator.random(4).tolist()
        if max(self.mixup_alpha, self.cutmix_alpha) == 0.0 or done >= self.p:
            return Mixture()
        cut = self.cutmix_alpha > 0.0 and (self.mixup_alpha == 0.0 or switch < self.switch_p)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        return Mixture(generator.beta(alpha, alpha), (centre[0], centre[1]) if cut else None)

    def apply(
        self, images: Tensor, labels: Tensor, num_classes: int, mixture: Mixture
    ) -> tuple[Tensor, Tensor]:
        """Mixed images (B, C, H, W) and targets (B, num_classes) float32 that sum to 1.

        images: (B, C, H, W) float, not changed; labels: (B,) int64. Of an odd batch the middle
        sample is its own partner.
        """
        height, width = images.shape[-2:]
        lam = mixture.lam
        if mixture.centre is not None:
            top, bottom, left, right = mixture.box(height, width)
            box = (..., slice(top, bottom), slice(left, right))
            images = images.clone()
            images[box] = images.flip(0)[box]
            # Rounding and the rim make the box smaller than what was drawn.
            lam = 1.0 - (bottom - top) * (right - left) / (height * width)
        elif lam != 1.0:
            images = images * lam + images.flip(0) * (1.0 - lam)
        targets = self._smoothed(labels, num_classes)
        return images, targets * lam + targets.flip(0) * (1.0 - lam)

    def _smoothed(self, labels: Tensor, num_classes: int) -> Tensor:
        """(B, num_classes) float32, one-hot but for the share that is spread."""
        low = self.smoothing / num_classes
        targets = torch.full((len(labels), num_classes), low, device=labels.device)
        return targets.scatter_(1, labels[:, None], 1.0 - self.smoothing + low)


def soft_target_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of the cross entropy with `targets (B, C)`, in float32.

    logits: (B, C). Equals the usual cross entropy where targets are one-hot.
    """
    return soft_target_rows(logits, targets).mean()


def soft_target_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """`(B,)`: the cross entropy of every sample, in float32; shapes as above."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1)
