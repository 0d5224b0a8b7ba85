"""The learned temperature of contrastive models."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LogitScale(nn.Module):
    """`exp` of a scalar parameter, which multiplies cosines. CLIP: starts at 1 / 0.07, at most 100.

    Call `clamp` after every update.
    """

    def __init__(self, temperature: float = 0.07, largest: float = 100.0) -> None:
        super().__init__()
        self.largest = largest
        self.log = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def forward(self) -> Tensor:
        return self.log.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the multiplier within 1 and `largest`."""
        self.log.clamp_(0, math.log(self.largest))
