"""Captions that belong to other samples, in a stated share: what web data look like (ALBEF)."""

from __future__ import annotations

import numpy as np

from vlx.data.order import permute

_STREAM = 0x0A1BEF  # apart from the orders of epochs, which `permute` also draws


def swapped(count: int, share: float, seed: int = 0) -> np.ndarray:
    """`(count,)` int64: the sample whose caption each sample carries.

    `round(share * count)` samples, the same on every machine, pass their captions on in a circle:
    each of them gets another one's, and every caption still occurs as often as before. A larger
    share adds samples to those of a smaller one. A single chosen sample keeps its own.
    """
    partner = np.arange(count, dtype=np.int64)
    chosen = permute(np.arange(round(share * count)), count, seed + _STREAM, 0)
    partner[chosen] = np.roll(chosen, 1)
    return partner
