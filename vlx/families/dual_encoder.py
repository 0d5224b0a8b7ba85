"""An image tower and a text tower into one space: what contrastive methods share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlx.blocks.vit_block import BlockHook
from vlx.core.capability import DualEncoder
from vlx.core.fields import TEXT, TEXT_LENGTH, ViewSpec
from vlx.core.method import Builder, ParamGroup
from vlx.encoders.base import VisionEncoder
from vlx.encoders.init import clip_vision_init
from vlx.ops.augment import HorizontalFlip, RandomResizedCrop
from vlx.ops.rand_augment import ALBEF_RANDOM

PAIR_FIELDS = (TEXT, TEXT_LENGTH)
_TEXTS_AT_ONCE = 256


def caption_view(
    crop_scale: Sequence[float], flip: float, rand_augment: float | None = None
) -> ViewSpec:
    """A crop and a flip, then ALBEF's (Li et al. 2021, section 3.5) two random operations of a
    strength 0..10 that leave alone the colours that captions name; None does none."""
    ops = [RandomResizedCrop(scale=(crop_scale[0], crop_scale[1])), HorizontalFlip(flip)]
    if rand_augment is not None:
        ops.append(replace(ALBEF_RANDOM, magnitude=rand_augment))
    return ViewSpec("image", ops=tuple(ops))


def exempt_class_tokens(groups: list[ParamGroup]) -> list[ParamGroup]:
    """Decayed and undecayed parameters, the class token of a ViT among the latter: in CLIP's code
    it is a vector, and vectors are not decayed."""
    decay, no_decay = groups
    for name, param in decay.params:
        if name.endswith(".cls_token"):
            no_decay.params.append((name, param))
    decay.params = [pair for pair in decay.params if not pair[0].endswith(".cls_token")]
    return [decay, no_decay]


class PairTowers(nn.Module):
    """What evaluators and losses ask of two towers; subclasses embed, each into unit length."""

    def __init__(self, build: Builder) -> None:
        super().__init__()
        self.tokenizer = build.tokenizer

    def embed_images(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, E) of unit length."""
        raise NotImplementedError

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids: (B, L), lengths: (B,). Returns (B, E) of unit length."""
        raise NotImplementedError

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts as they are written to (T, E) of unit length."""
        starts = range(0, len(texts), _TEXTS_AT_ONCE)
        parts = [texts[start : start + _TEXTS_AT_ONCE] for start in starts]
        return torch.cat([self.embed_text(*self.token_ids(part)) for part in parts])

    def token_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts to ids (T, L) and lengths (T,) on the towers' device."""
        device = next(self.parameters()).device
        found = self.tokenizer.encode(texts)
        return torch.from_numpy(found.ids).to(device), torch.from_numpy(found.lengths).to(device)


class Towers(PairTowers):
    """CLIP's: `image` and `text`, each with a projection into `embed_dim` dimensions without bias.

    A ViT is read at its class token; other models of timm by their own pooling (CLIP's ResNets:
    attention) and head.

    role: which of the run's encoders the image tower is. init: of that tower. text: keywords for
    the text tower, `activation="gelu"`. Weights of both towers together come from `load_clip`, so
    that the builder warns of no random ones.
    """

    def __init__(
        self,
        build: Builder,
        embed_dim: int,
        role: str = "encoder",
        init: Callable[[VisionEncoder], None] = clip_vision_init,
        **text: Any,
    ) -> None:
        super().__init__(build)
        self.image = build.vision(
            role, init=init, num_classes=embed_dim, head_bias=False, frozen=False
        )
        self.text = build.text(**text)
        self.projection = nn.Linear(self.text.pooled_dim, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=self.text.pooled_dim**-0.5)

    def embed_images(self, images: Tensor, *, hook: BlockHook | None = None) -> Tensor:
        return normalize(self.image.classify(self.image(images, hook=hook)), dim=-1)

    def embed_text(
        self,
        ids: Tensor,
        lengths: Tensor,
        *,
        embeddings: Tensor | None = None,
        hook: BlockHook | None = None,
    ) -> Tensor:
        """embeddings, hook: as `TextEncoder.forward` takes them."""
        out = self.text(ids, lengths, embeddings=embeddings, hook=hook)
        return normalize(self.projection(out.pooled), dim=-1)


class JointSpace(DualEncoder):
    """The towers as evaluators see them."""

    def __init__(self, towers: PairTowers, scale: nn.Module) -> None:
        self.towers, self.scale = towers, scale

    @property
    def logit_scale(self) -> float:
        return float(self.scale())

    def joint_image_features(self, images: Tensor) -> Tensor:
        return self.towers.embed_images(images)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        return self.towers.embed_texts(texts)
