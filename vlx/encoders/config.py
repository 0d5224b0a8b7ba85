"""What the recipe chooses of an encoder. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class PosEmbed(Enum):
    """Position table of a ViT."""

    learned = "learned"
    sincos = "sincos"


@dataclass(kw_only=True)
class EncoderConfig:
    name: str = "vit_base_patch16_224"
    """A timm model name; the keys below override its size."""
    image_size: int = 224
    """Side of the square input, in pixels."""
    patch_size: int | None = None
    """Side of a patch, in pixels; null keeps the model's own."""
    dim: int | None = None
    """Token width; null keeps the model's own."""
    depth: int | None = None
    """Number of blocks; null keeps the model's own."""
    heads: int | None = None
    """Attention heads; null keeps the model's own."""
    pos_embed: PosEmbed = PosEmbed.learned
    """learned, or sincos: fixed and not trained. A method may fix this as its paper does."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block, 0..1, rising linearly from 0."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Per-channel mean of RGB in 0..1; ImageNet's."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Per-channel standard deviation of RGB in 0..1; ImageNet's."""
    pretrained: bool = False
    """Start from timm's published weights of that name; the first use downloads them."""
    checkpoint: str | None = None
    """Weights to start from: a vlx run directory, a .safetensors or a .pth file."""
