"""Hyperparameters of methods that paint destroyed rectangles back. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vlx.core.config import MethodConfig


class Corruption(Enum):
    """What is put into a destroyed rectangle."""

    noise = "noise"
    zeros = "zeros"
    shift = "shift"


@dataclass(kw_only=True)
class GroupMaskingConfig(MethodConfig):
    """What methods have that destroy connected rectangles of an image (GMML, Atito et al. 2022)."""

    noise_max: float = 0.75
    """Most of the image that is destroyed, 0..1; the share is drawn from [0.5, this]. GMML's code:
    0.75."""
    alien_max: float = 0.3
    """Share of the image that another image's rectangles replace, 0..1. GMML's code: 0.3."""
    block_max: float = 0.3
    """Largest side of a rectangle as a share of the image's side, exclusive. GMML's code."""
    align: int = 1
    """Corners and sides are multiples of so many pixels; the patch size aligns. GMML's code: 1."""
    max_rectangles: int = 128
    """Rectangles drawn for an image. Ours: 0.75 takes about 85 on average."""
    corruptions: list[Corruption] = field(default_factory=lambda: [Corruption.noise])
    """Types of corruption, one drawn per image: noise, zeros, shift. GMML's code: noise."""
    clip_each: float | None = 3.0
    """Largest gradient norm of every tensor on its own; null clips none. GMML's code: 3."""
