"""Hyperparameters of methods that see images beside their captions. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlx.core.config import MethodConfig


@dataclass(kw_only=True)
class AlbefViewConfig(MethodConfig):
    """How ALBEF (Li et al., 2021) shows an image in training."""

    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Area of the random resized crop, low and high, 0..1. ALBEF's code: 0.2, 1; retrieval 0.5."""
    flip: float = 0.5
    """Probability of a horizontal flip. ALBEF's code: 0.5."""
    rand_augment: float | None = 7.0
    """Strength of two random operations that leave colours alone, 0..10; null does none. ALBEF's
    code: 7."""
