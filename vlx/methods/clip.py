"""CLIP: transferable visual models from natural language supervision (Radford et al., ICML 2021).

An image tower and a text tower, trained from scratch so that within a batch each image is nearest
to its own caption and each caption to its own image; a classifier for any classes is then made of
sentences that name them.

B batch, L tokens, E joint width.
Departures: `train.accumulate` above 1 caches gradients, so that it is the same batch in less
memory. `optim` and schedule are the paper's, whose training code was never published: the figures
of the recipe that only the paper has are from memory, those of open_clip's code agree with them.
Weight decay leaves out 1-D tensors; open_clip's newest code also exempts position tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vlx.blocks.logit_scale import LogitScale
from vlx.core.config import MethodConfig
from vlx.core.fields import Needs
from vlx.core.method import Builder
from vlx.core.paper import Paper
from vlx.encoders.clip_weights import load_clip
from vlx.families.contrastive import ContrastivePairs
from vlx.families.dual_encoder import PAIR_FIELDS, Towers, caption_view

PAPER = Paper(
    number=71,
    slug="clip",
    title="Learning Transferable Visual Models From Natural Language Supervision",
    year=2021,
    venue="ICML",
    url="https://arxiv.org/abs/2103.00020",
    family="alignment",
    commands=("align",),
    modalities=("image", "text"),
    trainable_params=151_277_313,
    gmacs=7.39,
)


@dataclass(kw_only=True)
class ClipConfig(MethodConfig):
    embed_dim: int = 512
    """Width of the joint space. ViT-B and RN101: 512; ViT-L: 768; RN50: 1024."""
    temperature: float = 0.07
    """Divides cosines at the start; learned. Paper section 2.5: 0.07."""
    crop_scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """Area of the random resized crop, low and high, 0..1. open_clip: 0.9, 1; the paper has a
    random square crop of the resized image."""
    flip: float = 0.0
    """Probability of a horizontal flip. Paper section 2.4: no augmentation but the crop."""
    weights: str | None = None
    """Weights of both towers to start from: a Hugging Face CLIPModel (directory or file), a file of
    OpenAI's or open_clip's names, or a vlx run."""


class Clip(ContrastivePairs):
    Config = ClipConfig

    def __init__(self, cfg: ClipConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.towers = Towers(build, cfg.embed_dim)
        self.logit_scale = LogitScale(cfg.temperature)
        if cfg.weights is not None and build.load_weights:
            load_clip(self.towers, self.logit_scale, cfg.weights)

    @classmethod
    def needs(cls, cfg: ClipConfig) -> Needs:
        return Needs(views=(caption_view(cfg.crop_scale, cfg.flip),), fields=PAIR_FIELDS)


METHOD = Clip
