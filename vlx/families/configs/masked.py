"""Hyperparameters of masked autoencoders that repaint patches. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlx.core.config import MethodConfig


@dataclass(kw_only=True)
class PatchDecoderConfig(MethodConfig):
    """The decoder that repaints hidden patches, MAE's sizes (He et al., 2022)."""

    mask_ratio: float = 0.75
    """Share of patches hidden, 0..1. MAE, section 4.1: 0.75."""
    decoder_dim: int = 512
    """Width of the decoder. MAE, table 1b: 512."""
    decoder_depth: int = 8
    """Blocks of the decoder. MAE, table 1a: 8."""
    decoder_heads: int = 16
    """Attention heads of the decoder. MAE's code: 16."""
    flip: float = 0.5
    """Probability of a horizontal flip. MAE's code: 0.5."""


@dataclass(kw_only=True)
class MaskedConfig(PatchDecoderConfig):
    """What methods have that hide patches of one random crop, as MAE does."""

    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Area of the random resized crop, low and high, 0..1. MAE, appendix A.1: 0.2, 1."""
