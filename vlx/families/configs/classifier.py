"""Hyperparameters of methods that train on labels. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlx.core.config import MethodConfig
from vlx.core.errors import ConfigError


@dataclass(kw_only=True)
class ClassifierConfig(MethodConfig):
    """What every method that trains on labels has: the recipe of DeiT (Touvron et al., 2021)."""

    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Area of the random resized crop, low and high, 0..1. DeiT: 0.08, 1."""
    crop_padding: int | None = None
    """Pad by so many pixels and cut a random window, instead of crop_scale; 4 for CIFAR."""
    flip: float = 0.5
    """Probability of a horizontal flip. DeiT: 0.5."""
    rand_augment: float | None = 9.0
    """Magnitude of RandAugment (two operations, deviation 0.5, increasing); null for none. DeiT: 9.
    """
    erasing: float = 0.25
    """Probability that a random box is erased. DeiT: 0.25."""
    mixup: float = 0.8
    """Alpha of mixup; 0 for none. DeiT: 0.8."""
    cutmix: float = 1.0
    """Alpha of CutMix, which takes mixup's place in half of the steps; 0 for none. DeiT: 1."""
    smoothing: float = 0.1
    """Label smoothing, 0..1. DeiT: 0.1."""

    def __post_init__(self) -> None:
        for name in ("flip", "erasing", "smoothing"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"method.{name}={value} must lie in 0..1")


@dataclass(kw_only=True)
class StagesConfig(ClassifierConfig):
    """What a method adds whose backbone has stages: their sizes, one entry a stage."""

    stage_dims: list[int] | None = None
    """Width of each stage; null keeps the model's own."""
    stage_depths: list[int] | None = None
    """Blocks of each stage; null keeps the model's own."""
    stage_heads: list[int] | None = None
    """Attention heads of each stage; null keeps the model's own."""
    stage_strides: list[int] | None = None
    """By how much each stage shrinks its map; null keeps the model's own."""
