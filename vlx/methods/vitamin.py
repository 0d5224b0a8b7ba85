"""ViTamin: designing scalable vision models in the vision-language era (Chen et al., CVPR 2024).

CLIP whose image tower is a hybrid: a stem and two stages of inverted bottlenecks with one LayerNorm
each, a strided convolution to a sixteenth of the side, then a plain ViT whose feed-forward is a
GeGLU. It has no class token: the mean of the tokens, normed, is projected into the joint space. All
else is open_clip's recipe, the same for every tower that the paper compares. Locked-text tuning
takes the text tower, its projection and the temperature of a larger trained model, and trains the
image side and the temperature beside the frozen text.

B batch, N tokens, C width of the stem, D width of the ViT, E joint width.
The towers are timm's `vitamin_*`; `vitamin_tiny_64` here has the same parts at a laptop's size.
Any other encoder trains by the same recipe, for comparison; as a plain backbone a ViTamin trains by
`vlx finetune supervised encoder.name=vitamin_small_224`.
Sources: official code and configurations, open_clip. Departures: colours are jittered in a fixed
order, where torchvision shuffles it. The published MACs leave out the two products of attention,
the figure here counts them. No configuration of locked-text tuning was published: that its recipe
is the short schedule's is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from timm.layers.hybrid_embed import HybridEmbed
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg
from torch import nn

from vlx.blocks.logit_scale import LogitScale
from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.core.config import MethodConfig
from vlx.core.errors import ConfigError
from vlx.core.fields import Needs
from vlx.core.method import Builder
from vlx.core.paper import Paper
from vlx.encoders.base import VisionEncoder
from vlx.encoders.clip_weights import load_clip, load_text_side
from vlx.encoders.init import clip_vision_init
from vlx.families.contrastive import ContrastivePairs
from vlx.families.dual_encoder import PAIR_FIELDS, Towers, caption_view
from vlx.ops.augment import ColorJitter, Grayscale

PAPER = Paper(
    number=9,
    slug="vitamin",
    title="ViTamin: Designing Scalable Vision Models in the Vision-Language Era",
    year=2024,
    venue="CVPR",
    url="https://arxiv.org/abs/2404.02132",
    family="alignment",
    commands=("align",),
    modalities=("image", "text"),
    trainable_params=62_469_185,
    gmacs=7.577,
    backbones=("vitamin_tiny_64",),
)


@dataclass(kw_only=True)
class VitaminConfig(MethodConfig):
    embed_dim: int = 384
    """Width of the joint space. S: 384, B: 512, L: 768, L2: 1024, XL: 1152; with L's text: 768."""
    temperature: float = 0.07
    """Divides cosines at the start; learned. Official code: 0.07."""
    crop_scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """Area of the random resized crop, low and high, 0..1. Short schedule: 0.9, 1; long: 0.4, 1."""
    jitter: float = 0.0
    """Probability of the colour jitter: 0.32, 0.32, 0.32 and a hue of 0.08. Long schedule: 0.8."""
    grey: float = 0.0
    """Probability of an image without colour. Long schedule: 0.2."""
    weights: str | None = None
    """Weights of both towers to start from: a vlx run, or a file of open_clip's names."""
    locked_text: str | None = None
    """Locked-text tuning: a run or file as above, of another image tower, whose text tower,
    projection and temperature are taken; all but the temperature then stays as it is."""

    def __post_init__(self) -> None:
        if self.weights is not None and self.locked_text is not None:
            raise ConfigError(
                "method.weights and method.locked_text both give a text tower: set one"
            )


def open_clip_init(encoder: VisionEncoder) -> None:
    """As open_clip starts a tower of timm: timm's own, the projection as PyTorch's layers start;
    a plain ViT as CLIP's."""
    clip_vision_init(encoder)
    head = getattr(encoder.backbone, "head", None)
    if isinstance(encoder.backbone, VisionTransformer) and isinstance(head, nn.Linear):
        head.reset_parameters()


class Vitamin(ContrastivePairs):
    Config = VitaminConfig

    def __init__(self, cfg: VitaminConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.towers = Towers(build, cfg.embed_dim, init=open_clip_init, activation="gelu")
        self.logit_scale = LogitScale(cfg.temperature)
        if cfg.weights is not None and build.load_weights:
            load_clip(self.towers, self.logit_scale, cfg.weights)
        if cfg.locked_text is not None:
            if build.load_weights:
                load_text_side(self.towers, self.logit_scale, cfg.locked_text)
            self.towers.text.requires_grad_(False)
            self.towers.projection.requires_grad_(False)

    def frozen_parts(self) -> tuple[str, ...]:
        return () if self.cfg.locked_text is None else ("towers.text", "towers.projection")

    @classmethod
    def needs(cls, cfg: VitaminConfig) -> Needs:
        view = caption_view(cfg.crop_scale, flip=0.0)
        colours = ColorJitter(0.32, 0.32, 0.32, 0.08, p=cfg.jitter)
        view = replace(view, ops=(*view.ops, colours, Grayscale(cfg.grey)))
        return Needs(views=(view,), fields=PAIR_FIELDS)


TINY = "vitamin_tiny_64"
default_cfgs = cfgs_of((TINY,), size=64, first_conv="patch_embed.backbone.stem.conv1")


@register_model
def vitamin_tiny_64(
    pretrained: bool = False, embed_dim: int = 96, stem_width: int = 16, **kwargs: Any
) -> VisionTransformer:
    """ViTamin's parts for pictures of 64 pixels: one block in each convolutional stage, of widths
    16 and 32, then four of the ViT; 16 tokens."""
    stages = VitCfg(
        embed_dim=(stem_width, 2 * stem_width, embed_dim), depths=(1, 1), stem_width=stem_width
    )
    backbone = MbConvStages(stages, in_chans=kwargs.get("in_chans", 3))
    sizes = {
        "img_size": 64,
        "embed_layer": partial(HybridEmbed, backbone=backbone, proj=False),
        "patch_size": 1,
        "embed_dim": embed_dim,
        "depth": 4,
        "num_heads": 3,
        "mlp_layer": GeGluMlp,
        "mlp_ratio": 2.0,
        "class_token": False,
        "global_pool": "avg",
    }
    return build_model(VisionTransformer, TINY, pretrained, features=3, **{**sizes, **kwargs})


METHOD = Vitamin
