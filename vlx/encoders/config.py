"""What the recipe chooses of an encoder. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vlx.core.caption import Clean


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
    foreign_statistics: bool = False
    """Keep mean and std where published weights were trained with others, which is an error
    otherwise. VL2V-ADiP's code: ImageNet's for every model."""
    pretrained: bool = False
    """Start from timm's published weights of that name; the first use downloads them."""
    checkpoint: str | None = None
    """Weights to start from: a vlx run directory, a .safetensors or a .pth file."""


@dataclass(kw_only=True)
class TextConfig:
    """The text side of a model: a text encoder or a language model, and its tokenizer."""

    name: str = "clip"
    """clip (CLIP's causal transformer), a kind of transformers (bert, roberta, llama, qwen2, ...)
    built from the sizes below, or a local directory of Hugging Face with config and weights."""
    tokenizer: str = "clip"
    """clip (CLIP's byte-level BPE, 49,408 ids), bpe (trained on the captions of the training
    split), a vlx run whose own one to use, or a local Hugging Face tokenizer: a directory or a
    tokenizer.json."""
    clean: Clean = Clean.none
    """How captions are cleaned before that, in training and evaluation: none, or albef (lower case,
    no punctuation, at most 30 words)."""
    vocab_size: int | None = None
    """Ids of a trained tokenizer and rows of the token table; null takes the tokenizer's own."""
    context_length: int = 77
    """Tokens of a text at most, start and end included. CLIP: 77."""
    dim: int | None = None
    """Token width; null takes 512 (clip) or the kind's own."""
    depth: int | None = None
    """Number of blocks; null takes 12 (clip) or the kind's own."""
    heads: int | None = None
    """Attention heads; null takes dim / 64."""
    checkpoint: str | None = None
    """Weights of the text encoder to start from: a vlx run directory, a .safetensors or a .pth
    file."""
