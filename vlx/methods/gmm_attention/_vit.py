"""The paper's ViT."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlx.blocks.init import xavier_normal_init
from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.methods.gmm_attention._mask import (
    ElementwiseMask,
    GaussianMixture,
    Host,
    MakeMask,
    MaskedAttention,
    drop_alike,
)


class MaskedVit(Host, VisionTransformer):
    """A small ViT; `mask` makes one for the heads and grid of a layer, None for none.

    drop_path_rate: of every block alike, as in the released code. With a mask there is no class
    token: the mask has no row for it.
    """

    def __init__(
        self,
        *,
        mask: MakeMask | None,
        class_token: bool,
        drop_path_rate: float = 0.0,
        **arguments: Any,
    ) -> None:
        super().__init__(
            class_token=class_token,
            global_pool="token" if class_token else "avg",
            qkv_bias=False,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
            weight_init="skip",
            **arguments,
        )
        heads, grid = arguments["num_heads"], self.patch_embed.grid_size
        drop_alike(self.blocks, drop_path_rate)
        for block in self.blocks:
            if mask is not None:
                block.attn = MaskedAttention(self.embed_dim, heads, mask(heads, grid))
        xavier_normal_init(self)
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                nn.init.normal_(table)


_NAMES = ("gmm_vit_patch4_32", "elm_vit_patch4_32", "small_vit_patch4_32", "mean_vit_patch4_32")
default_cfgs = cfgs_of(_NAMES, size=32, first_conv="patch_embed.proj")

# The released code's for 32x32 images; its deeper ViTs have other depths and widths.
_SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 9, "num_heads": 12, "mlp_ratio": 2,
}  # fmt: skip


def _create(name: str, pretrained: bool, given: dict[str, Any], **part: Any) -> MaskedVit:
    return build_model(MaskedVit, name, pretrained, features=3, **{**_SIZES, **part, **given})


@register_model
def gmm_vit_patch4_32(pretrained: bool = False, num_kernels: int = 5, **kwargs: Any) -> MaskedVit:
    """GMM-ViT."""
    mask = partial(GaussianMixture, num_kernels=num_kernels)
    return _create("gmm_vit_patch4_32", pretrained, kwargs, mask=mask, class_token=False)


@register_model
def elm_vit_patch4_32(pretrained: bool = False, **kwargs: Any) -> MaskedVit:
    """ViT with an element-wise learned mask."""
    return _create("elm_vit_patch4_32", pretrained, kwargs, mask=ElementwiseMask, class_token=False)


@register_model
def small_vit_patch4_32(pretrained: bool = False, **kwargs: Any) -> MaskedVit:
    """The paper's baseline: no mask, a class token."""
    return _create("small_vit_patch4_32", pretrained, kwargs, mask=None, class_token=True)


@register_model
def mean_vit_patch4_32(pretrained: bool = False, **kwargs: Any) -> MaskedVit:
    """No mask, the mean over tokens: what GMM-ViT is but for its mask."""
    return _create("mean_vit_patch4_32", pretrained, kwargs, mask=None, class_token=False)
