"""CoOp: learning to prompt for vision-language models (Zhou et al., IJCV 2022), and CoCoOp:
conditional prompt learning (Zhou et al., CVPR 2022).

The hand-written "a photo of a" before a class name becomes M vectors that are learned from a few
labelled images beside a frozen CLIP. CoCoOp adds to all of them a shift that a small network makes
of the image, so that every image has its own prompts.

B batch, C classes, M learned vectors, D width of the text tower, E joint width.
Departures: prompts stay in fp32 (official code: fp16), frozen embeddings are looked up and not
stored, and names that do not fit are cut where the official tokenizer refuses them. M is the number
of tokens of `context_init`, for CLIP's tokenizer and the published words that of its words. The
official cosine is as long as the run and begins after the constant epoch, so that the last epochs
are not reached (from memory of the library); here it runs over the epochs that are left. CoCoOp
with more texts than fit at once (the paper's batch is 1) takes the images in turn and computes them
again in the backward pass: same gradients, bounded memory.
The `paper` preset is base-to-new on ViT-B/16, `rn50` the few-shot setting of the CoOp paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlx.blocks.prompts import ClassTexts
from vlx.core.errors import ConfigError
from vlx.core.method import Builder
from vlx.core.paper import Paper
from vlx.core.released import Renames, renamed
from vlx.families.configs.clip_tuning import ClassPosition, ContextConfig
from vlx.families.context_tuning import ContextTuning

PAPER = Paper(
    number=0,
    slug="coop",
    title="Learning to Prompt for Vision-Language Models",
    year=2022,
    venue="IJCV",
    url="https://arxiv.org/abs/2109.01134",
    family="clip-tuning",
    commands=("finetune",),
    modalities=("image", "text"),
    trainable_params=2_048,
)


class Variant(Enum):
    """Whose prompts."""

    coop = "coop"
    cocoop = "cocoop"


@dataclass(kw_only=True)
class CoopConfig(ContextConfig):
    variant: Variant = Variant.coop
    """coop: the same vectors for every image; cocoop: shifted by what a network makes of it."""
    reduction: int = 16
    """cocoop: the network's hidden layer is so many times narrower than the joint space. 16."""
    texts_at_once: int = 256
    """cocoop: texts, classes times images, that are in memory at a time. Ours."""

    def __post_init__(self) -> None:
        ContextConfig.__post_init__(self)
        if self.variant is not Variant.cocoop:
            return
        if self.class_specific or self.class_position is not ClassPosition.end:
            raise ConfigError(
                "method.variant=cocoop has one context for all classes and the name at its end: "
                "use method.class_specific=false method.class_position=end"
            )


class SameForAll(nn.Module):
    """CoOp's context."""

    def forward(self, context: Tensor, image: Tensor, embed: Callable, count: int) -> Tensor:
        return embed(context)  # (C, E)


class Conditional(nn.Module):
    """CoCoOp's context: `v_m + W2 ReLU(W1 x)`, x the image's feature of unit length."""

    def __init__(self, image_dim: int, dim: int, reduction: int, texts_at_once: int) -> None:
        super().__init__()
        hidden = max(1, image_dim // reduction)
        self.meta_net = nn.Sequential(
            nn.Linear(image_dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)
        )
        self.texts_at_once = texts_at_once

    def forward(self, context: Tensor, image: Tensor, embed: Callable, count: int) -> Tensor:
        """embed: vectors (b, 1, M, D) to features (b, C, E); count: C."""
        shifted = (context + self.meta_net(image).unsqueeze(1)).unsqueeze(1)  # (B, 1, M, D)
        parts = shifted.split(max(1, self.texts_at_once // count))
        if len(parts) > 1:  # without the graphs of the others in memory
            embed = partial(checkpoint, embed, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([embed(part) for part in parts])


_RELEASED: Renames = (
    (r"^token_(prefix|suffix)$", None),  # of the class names
    (r"^ctx$", "context"),
    (r"^meta_net\.linear1\.", "prompts.meta_net.0."),
    (r"^meta_net\.linear2\.", "prompts.meta_net.2."),
)


class Coop(ContextTuning):
    Config = CoopConfig

    def __init__(self, cfg: CoopConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        if cfg.variant is Variant.cocoop:
            dim = self.towers.text.spec.dim
            self.prompts: nn.Module = Conditional(
                cfg.embed_dim, dim, cfg.reduction, cfg.texts_at_once
            )
        else:
            self.prompts = SameForAll()

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From those of CoOp's and CoCoOp's released prompts."""
        return renamed(state, _RELEASED)

    def text_features(self, image: Tensor, texts: ClassTexts) -> Tensor:
        embed = partial(self.embed_names, texts)
        return self.prompts(self.context, image, embed, len(texts))


METHOD = Coop
