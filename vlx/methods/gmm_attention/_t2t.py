"""T2T-ViT: overlapping 3x3 windows become tokens, step by step, before a plain ViT's blocks.

Yuan et al., ICCV 2021, with transformers for the first steps. The mask multiplies the logits of
all layers, those of the steps too, on the grid of each. No class token: the released code makes one
and averages the tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import unfold

from vlx.blocks.init import trunc_normal_init
from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.core.errors import ConfigError
from vlx.methods.gmm_attention._mask import (
    GaussianMixture,
    Host,
    MakeMask,
    MaskedAttention,
    masked,
)
from vlx.ops.posembed import sincos_1d


class TokenTransformer(nn.Module):
    """A layer of one head that narrows its tokens, (B, N, width) to (B, N, dim): the values are the
    residual, since tokens of another width cannot be."""

    def __init__(self, width: int, dim: int, mask: nn.Module | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * dim, bias=False)
        self.scale = width**-0.5  # of the tokens, not the keys: as T2T-ViT has it
        self.mask = mask
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        logits = masked(q * self.scale @ k.transpose(-2, -1), self.mask)
        x = v + self.proj(logits.softmax(-1).to(v.dtype) @ v)
        return x + self.mlp(self.norm2(x))


def soft_split(maps: Tensor) -> Tensor:
    """3x3 windows at every second place: (B, C, h, w) to (B, h/2 * w/2, 9 C)."""
    return unfold(maps, 3, stride=2, padding=1).transpose(1, 2)


class TokensToToken(PatchEmbed):
    """(B, 3, H, W) to (B, N, D): a soft split for each halving of the grid down to the patch size,
    a `TokenTransformer` of width `token_dim` between any two."""

    img_size: tuple[int, int]
    patch_size: tuple[int, int]

    def __init__(
        self,
        *,
        mask: MakeMask | None,
        token_dim: int,
        in_chans: int,
        embed_dim: int,
        **arguments: Any,
    ) -> None:
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, **arguments)
        patch, (height, width) = self.patch_size[0], self.img_size
        if patch < 2 or patch & (patch - 1) or height % patch or width % patch:
            raise ConfigError(
                f"encoder.patch_size={patch} must be a power of 2, at least 2, that divides "
                f"encoder.image_size={height}: T2T halves the grid at every step"
            )
        layers, channels = [], 9 * in_chans
        for step in range(1, patch.bit_length() - 1):
            grid = (height >> step, width >> step)
            layers.append(TokenTransformer(channels, token_dim, mask and mask(1, grid)))
            channels = 9 * token_dim
        self.layers = nn.ModuleList(layers)
        self.proj = nn.Linear(channels, embed_dim)  # type: ignore[assignment] # for a convolution

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            side = x.shape[-2] // 2
            x = layer(soft_split(x)).transpose(1, 2).unflatten(2, (side, -1))
        return self.proj(soft_split(x))


class ResidualAttention(MaskedAttention):
    """With a residual of its own: the released code adds the normed tokens to what they attend to,
    inside the block's own residual."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return x + super().forward(x, attn_mask, is_causal)


class MaskedT2t(Host, VisionTransformer):
    """`mask` makes one for the heads and grid of a layer, None for none.

    token_dim: width between the steps of splitting.
    """

    def __init__(self, *, mask: MakeMask | None, token_dim: int, **arguments: Any) -> None:
        super().__init__(
            embed_layer=partial(TokensToToken, mask=mask, token_dim=token_dim),  # type: ignore[arg-type]
            class_token=False,
            global_pool="avg",
            fc_norm=False,  # every token is normed, then averaged
            qkv_bias=False,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
            weight_init="skip",
            **arguments,
        )
        heads, grid = arguments["num_heads"], self.patch_embed.grid_size
        for block in self.blocks:
            block.attn = ResidualAttention(self.embed_dim, heads, mask and mask(heads, grid))
        trunc_normal_init(self)
        table = sincos_1d(torch.arange(self.patch_embed.num_patches), self.embed_dim)
        self.pos_embed = nn.Parameter(table.float()[None], requires_grad=False)


_NAMES = ("gmm_t2t_patch4_32", "small_t2t_patch4_32")
default_cfgs = cfgs_of(_NAMES, size=32)

# The released code's for 32x32 images; at 64x64 it has patches of 8.
_SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2,
    "token_dim": 64,
}  # fmt: skip


def _create(name: str, pretrained: bool, given: dict[str, Any], mask: MakeMask | None) -> Any:
    arguments = {**_SIZES, **given, "mask": mask}
    return build_model(MaskedT2t, name, pretrained, features=3, **arguments)


@register_model
def gmm_t2t_patch4_32(pretrained: bool = False, num_kernels: int = 5, **kwargs: Any) -> MaskedT2t:
    """GMM-T2T."""
    mask = partial(GaussianMixture, num_kernels=num_kernels)
    return _create("gmm_t2t_patch4_32", pretrained, kwargs, mask)


@register_model
def small_t2t_patch4_32(pretrained: bool = False, **kwargs: Any) -> MaskedT2t:
    """The paper's T2T-ViT without a mask."""
    return _create("small_t2t_patch4_32", pretrained, kwargs, None)
