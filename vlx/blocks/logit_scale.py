"""The learned temperature of contrastive models.

Parameters are of shape (1,), what they give of shape (): FSDP2 shards no scalars.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _Number(nn.Module):
    """A learned number of shape (1,) that also loads from a scalar, which older runs hold."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in (prefix + name for name in self._parameters):
            if key in state_dict:
                state_dict[key] = state_dict[key].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LogitScale(_Number):
    """`exp` of a parameter, which multiplies cosines. CLIP: starts at 1 / 0.07, at most 100.

    Call `clamp` after every update.
    """

    def __init__(self, temperature: float = 0.07, largest: float = 100.0) -> None:
        super().__init__()
        self.largest = largest
        self.log = nn.Parameter(torch.tensor([math.log(1 / temperature)]))

    def forward(self) -> Tensor:
        return self.log.exp().squeeze(0)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the multiplier within 1 and `largest`."""
        self.log.clamp_(0, math.log(self.largest))


class Temperature(_Number):
    """A parameter that divides cosines, kept within 0.001 and 0.5 (ALBEF, Li et al. 2021).

    Call `clamp` after every update.
    """

    def __init__(self, start: float = 0.07) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([start]))

    def forward(self) -> Tensor:
        """What multiplies cosines."""
        return 1 / self.value.squeeze(0)

    @torch.no_grad()
    def clamp(self) -> None:
        self.value.clamp_(0.001, 0.5)
