"""AutoAugment (Cubuk 2019): pairs of RandAugment's operations, found for a data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlx.ops.rand_augment import DRAWS_PER_OP, LARGEST, OPERATIONS, RandAugment, Ranges
from vlx.ops.resample import Interpolation

CIFAR_POLICY = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("auto_contrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("auto_contrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("auto_contrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("auto_contrast", 0.9, 0)),
)
"""AutoAugment's policy for CIFAR-10 (Cubuk 2019, table 7): pairs of (operation, probability, bin of
ten)."""
_BINS = 10
_RANGES = Ranges(translate=150 / 331, least_bits=4)


@dataclass(frozen=True)
class AutoAugment(RandAugment):
    """One pair of a policy an image, each of its two operations with the probability found for it.

    Angles, shifts and factors of a bin are torchvision's, their sign random.
    """

    policy: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = CIFAR_POLICY
    ranges: Ranges = _RANGES
    interpolation: Interpolation = Interpolation.bilinear
    fill: tuple[float, float, float] = (128 / 255, 128 / 255, 128 / 255)

    def parameters(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `RandAugment`'s."""
        draws = u.view(len(u), self.num_ops, DRAWS_PER_OP)
        pair = (draws[:, 0, 0] * len(self.policy)).to(torch.int64)

        def column(which: int) -> list[list[float]]:
            return [[float(step[which]) for step in steps] for steps in self._numbered()]

        operation, p, place = (u.new_tensor(column(which))[pair] for which in range(3))
        done = draws[..., 1] < p
        level = place * (LARGEST / (_BINS - 1))
        sign = torch.where(draws[..., 3] < 0.5, 1.0, -1.0)
        nothing = len(OPERATIONS)
        return operation.to(torch.int64).masked_fill(~done, nothing), level, sign

    def _numbered(self) -> list[list[tuple[int, float, int]]]:
        """The policy with operations as positions in `OPERATIONS`."""
        return [[(OPERATIONS.index(name), p, place) for name, p, place in s] for s in self.policy]
