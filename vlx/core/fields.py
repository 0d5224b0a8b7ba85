"""What a method asks of the data: fields of the source and views made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""Tensors by field or view name. `sample_id (B,)` int64 is always there."""


@dataclass(frozen=True)
class Field:
    """A named kind of data. `layout` names its axes; a synthetic source makes it from these."""

    name: str
    layout: str
    dtype: torch.dtype
    meaning: str


IMAGE = Field("image", "B 3 H W", torch.float32, "RGB in 0..1, not normalised")
LABEL = Field("label", "B", torch.int64, "class index, 0..num_classes-1")
TEXT = Field("text", "B L", torch.int64, "token ids of one caption a sample, padded behind")
TEXT_LENGTH = Field("text_length", "B", torch.int64, "tokens of `text` that are no padding")
_OF_CAPTIONS = {"text", "text_length"}


class ViewOp(Protocol):
    """One step of an augmentation, batched on the device, with parameters per sample.

    `draws` uniforms in [0, 1) per sample come in as `u (B, draws)`: the op itself holds no
    generator, so the same sample in the same epoch is augmented alike everywhere.
    """

    @property
    def draws(self) -> int: ...

    def __call__(self, images: Tensor, sizes: Tensor, u: Tensor, size: int) -> Tensor:
        """images: (B, 3, H, W) float in 0..1, padded; sizes: (B, 2) true (height, width).

        An op that changes the geometry returns (B, 3, size, size); the others keep the shape.
        """
        ...


@dataclass(frozen=True)
class ViewSpec:
    """One augmented picture of a sample, made by `ops` in order from a field or another view."""

    name: str
    ops: tuple[ViewOp, ...]
    of: str = "image"
    """A field of the source, or a view declared earlier (a crop of a crop)."""
    size: int | None = None
    """Side in pixels; None takes the encoder's image size."""
    keep: bool = True
    """False for a view that only other views are made of: it is not in the batch."""


@dataclass(frozen=True)
class Needs:
    """Everything `Trainable.step` reads: views by name, and fields passed through as they are."""

    views: tuple[ViewSpec, ...]
    fields: tuple[Field, ...] = ()

    @property
    def source_fields(self) -> tuple[str, ...]:
        """Names of the fields that the source must have."""
        made: set[str] = set()
        names = []
        for view in self.views:  # a view of a name declared earlier is of that view
            if view.of not in made:
                names.append(view.of)
            made.add(view.name)
        names += ["caption" if f.name in _OF_CAPTIONS else f.name for f in self.fields]
        return tuple(dict.fromkeys(names))

    @property
    def text(self) -> bool:
        """Whether a batch holds token ids, so that a tokenizer is needed."""
        return any(field.name in _OF_CAPTIONS for field in self.fields)

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """Names that a batch holds besides `sample_id`."""
        return (*(v.name for v in self.views if v.keep), *(f.name for f in self.fields))
