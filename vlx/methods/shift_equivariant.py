"""Polyphase anchoring: Reviving Shift Equivariance in Vision Transformers (Ding et al., 2023).

Attention does not mind where tokens lie; strides, windows and position tables do. Before every
operation of a stride the map is rolled so that its largest polyphase component comes first, and
positions come from a circularly padded depth-wise convolution. Then the logits of a circularly
shifted image are those of the image.

B batch, D width, s stride of an operation.
PolyViT is a plain ViT, PolyTwins is Twins-SVT; the plain models beside them are trained by
`vlx finetune supervised`, and `vlx eval shifts` measures any classifier.
Departures: norms are summed in float64, and a roll is a gather; the reference's float32 and its
sampling with a hand-written gradient are not needed. The release builds its models without the
stochastic depth of its configuration files: the presets are without. Anchoring inside a model that
was trained without it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.layers.patch_embed import PatchEmbed as VitPatchEmbed
from timm.models import register_model
from timm.models.twins import Block, PatchEmbed, Twins
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.core.errors import ConfigError
from vlx.core.paper import Paper
from vlx.families.backbone import BackboneClassifier
from vlx.families.configs.classifier import ClassifierConfig
from vlx.ops.polyphase import polyphase_anchor
from vlx.ops.tokens import map_to_tokens, tokens_to_map

PAPER = Paper(
    number=51,
    slug="shift-equivariant",
    title="Reviving Shift Equivariance in Vision Transformers",
    year=2023,
    venue="arXiv",
    url="https://arxiv.org/abs/2306.07470",
    family="backbone",
    commands=("finetune",),
    modalities=("image",),
    trainable_params=56_070_952,
    gmacs=8.63,
    backbones=(
        "poly_vit_small_patch16_224",
        "poly_vit_base_patch16_224",
        "poly_twins_svt_small",
        "poly_twins_svt_base",
    ),
)


@dataclass(kw_only=True)
class ShiftEquivariantConfig(ClassifierConfig):
    """Keys of the recipe alone: the method is its backbone."""


class CircularConv(nn.Conv2d):
    """Depth-wise 3x3 whose padding continues on the other side."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, padding_mode="circular")


class PolyPatchEmbed(VitPatchEmbed):
    """Anchor, patches, LayerNorm, then a residual convolution in the place of a position table."""

    def __init__(self, *, img_size: int, patch_size: int, embed_dim: int, **arguments: Any) -> None:
        if img_size % patch_size:
            raise ConfigError(
                f"encoder.image_size={img_size} is no multiple of encoder.patch_size={patch_size}"
            )
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            norm_layer=nn.LayerNorm,
            **arguments,
        )
        self.position = CircularConv(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, N, D)."""
        x = self.proj(polyphase_anchor(x, self.proj.stride[0]))
        size = (x.shape[2], x.shape[3])
        grid = tokens_to_map(self.norm(map_to_tokens(x)), size)
        return map_to_tokens(grid + self.position(grid))


class PolyVit(VisionTransformer):
    """timm's ViT on anchored patches, without a position table."""

    def __init__(self, *, img_size: int = 224, patch_size: int = 16, **arguments: Any) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            pos_embed="none",
            embed_layer=PolyPatchEmbed,
            **arguments,
        )

    def no_weight_decay(self) -> set[str]:
        """The class token, as the release has it."""
        return {"cls_token"}


class AnchoredPatchEmbed(PatchEmbed):
    """Twins' first patch embedding on anchored images."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        return super().forward(polyphase_anchor(x, self.patch_size[0]))  # type: ignore[index]


class AnchoredBlock(Block):
    """A block of Twins whose map is anchored to its window, or to the stride of its keys. Nothing
    is rolled back: the anchored map is what the rest of the network sees."""

    def __init__(self, *, sr_ratio: int, ws: int, **arguments: Any) -> None:
        super().__init__(sr_ratio=sr_ratio, ws=ws, **arguments)
        self.anchor = ws if ws > 1 else sr_ratio

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x: (B, h * w, D); size: (h, w)."""
        x = map_to_tokens(polyphase_anchor(tokens_to_map(x, size), self.anchor))
        return super().forward(x, size)


class PolyTwins(Twins):
    """timm's Twins-SVT with anchors before its stem and its blocks, and circular positions."""

    def __init__(self, *, img_size: int = 224, in_chans: int = 3, **arguments: Any) -> None:
        super().__init__(img_size=img_size, in_chans=in_chans, block_cls=AnchoredBlock, **arguments)
        dims = arguments["embed_dims"]
        self.patch_embeds[0] = AnchoredPatchEmbed(img_size, 4, in_chans, dims[0])
        for block, dim in zip(self.pos_block, dims):
            block.proj[0] = CircularConv(dim)  # type: ignore[index, union-attr]
        for part in (self.patch_embeds[0], self.pos_block):
            part.apply(self._init_weights)


default_cfgs = cfgs_of(PAPER.backbones)


def _vit(name: str, pretrained: bool, sizes: dict[str, Any], given: dict[str, Any]) -> PolyVit:
    return build_model(PolyVit, name, pretrained, features=3, **{**sizes, **given})


def _twins(name: str, pretrained: bool, sizes: dict[str, Any], given: dict[str, Any]) -> PolyTwins:
    common = {"wss": (7, 7, 7, 7), "sr_ratios": (8, 4, 2, 1)}
    arguments = {**common, **sizes, **given}
    return build_model(PolyTwins, name, pretrained, features=(0, 1, 2, 3), **arguments)


@register_model
def poly_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> PolyVit:
    """PolyViT-S/16: 21.98 M parameters."""
    sizes = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _vit("poly_vit_small_patch16_224", pretrained, sizes, kwargs)


@register_model
def poly_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> PolyVit:
    """PolyViT-B/16: 86.4 M parameters."""
    sizes = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return _vit("poly_vit_base_patch16_224", pretrained, sizes, kwargs)


@register_model
def poly_twins_svt_small(pretrained: bool = False, **kwargs: Any) -> PolyTwins:
    """PolyTwins-S: 24.1 M parameters."""
    sizes = {"embed_dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16), "depths": (2, 2, 10, 4)}
    return _twins("poly_twins_svt_small", pretrained, sizes, kwargs)


@register_model
def poly_twins_svt_base(pretrained: bool = False, **kwargs: Any) -> PolyTwins:
    """PolyTwins-B: 56.1 M parameters."""
    sizes = {
        "embed_dims": (96, 192, 384, 768),
        "num_heads": (3, 6, 12, 24),
        "depths": (2, 2, 18, 2),
    }
    return _twins("poly_twins_svt_base", pretrained, sizes, kwargs)


class ShiftEquivariant(BackboneClassifier):
    Config = ShiftEquivariantConfig
    Backbone = (PolyVit, PolyTwins)
    models = PAPER.backbones


METHOD = ShiftEquivariant
