"""Base class of a method's own hyperparameters. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vlx.core.errors import ConfigError


@dataclass(kw_only=True)
class MethodConfig:
    """The paper's own hyperparameters, the paper's values as defaults.

    A subclass is a dataclass with literal defaults and a docstring under each field. It may use
    enums defined in the same module and nothing that needs torch: the command line builds the
    schema from the class's source alone, so that a typo is answered before torch is imported.
    """


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


@dataclass(kw_only=True)
class ClipTuningConfig(MethodConfig):
    """What every method has that trains a few parameters beside a frozen CLIP."""

    embed_dim: int = 512
    """Width of CLIP's joint space. ViT-B: 512; ViT-L: 768; RN50: 1024."""
    weights: str | None = None
    """CLIP's weights: a vlx run of `align clip` (with text.tokenizer=RUN), a Hugging Face CLIPModel
    (directory or file), or a file of OpenAI's or open_clip's names."""
    ending: str = "."
    """What a class's sentence ends with, after the name. CoOp's code: a full stop."""
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Area of the random resized crop, low and high, 0..1. CoOp's code: 0.08, 1."""
    flip: float = 0.5
    """Probability of a horizontal flip. CoOp's code: 0.5."""


class ClassPosition(Enum):
    """Where the class name stands among the context vectors."""

    end = "end"
    middle = "middle"
    front = "front"


@dataclass(kw_only=True)
class ContextConfig(ClipTuningConfig):
    """What methods have whose learned vectors stand around the class name (CoOp)."""

    context_tokens: int = 16
    """Learned vectors, where context_init names no words. CoOp: 16."""
    context_init: str | None = None
    """Words whose embeddings the vectors start from, one vector a token ("a photo of a": 4); null
    starts from N(0, 0.02^2)."""
    class_specific: bool = False
    """Vectors of its own for every class, which new classes then do not have."""
    class_position: ClassPosition = ClassPosition.end
    """end: vectors, name; front: name, vectors; middle: half of the vectors on either side, the
    second half the larger where they are odd."""

    def __post_init__(self) -> None:
        if self.context_tokens < 1:
            raise ConfigError(f"method.context_tokens={self.context_tokens} must be at least 1")
        if self.class_specific and self.context_init is not None:
            raise ConfigError(
                f"method.context_init={self.context_init!r}: class-specific vectors start from "
                "random ones. Use method.context_init=null or method.class_specific=false"
            )


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
