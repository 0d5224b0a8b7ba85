"""Hyperparameters of methods that train little beside a frozen CLIP. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vlx.core.config import MethodConfig
from vlx.core.errors import ConfigError


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
