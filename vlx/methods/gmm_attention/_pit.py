"""PiT: timm's, with patches that do not overlap and a 1x1 convolution after each pooling.

The mask multiplies the logits between patches, on the grid of each stage; the row and the column of
the class token stay as they are. Of the last layer the head reads that row alone, so the last mask
changes nothing and gets a gradient of zero, as in the released code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models import register_model
from timm.models.pit import PoolingVisionTransformer, Transformer
from torch import Tensor, nn

from vlx.blocks.init import xavier_normal_init
from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.methods.gmm_attention._mask import (
    GaussianMixture,
    Host,
    MakeMask,
    MaskedAttention,
    drop_alike,
)


class MaskedPit(Host, PoolingVisionTransformer):
    """`mask` makes one for the heads and grid of a layer, None for none.

    drop_path_rate: of every block alike.
    """

    def __init__(
        self,
        *,
        mask: MakeMask | None,
        patch_size: int,
        drop_path_rate: float = 0.0,
        **arguments: Any,
    ) -> None:
        super().__init__(patch_size=patch_size, stride=patch_size, **arguments)
        rows, columns = self.patch_embed.grid_size
        for stage, heads, head_dim in zip(self.transformers, self.heads, self.base_dims):
            assert isinstance(stage, Transformer)
            dim = heads * head_dim
            if stage.pool is not None:
                rows, columns = (rows + 1) // 2, (columns + 1) // 2
                stage.pool.conv = nn.Sequential(stage.pool.conv, nn.Conv2d(dim, dim, 1))
            drop_alike(stage.blocks, drop_path_rate)
            for block in stage.blocks:
                if mask is None:
                    block.attn = Attention(dim, heads, qkv_bias=False)
                else:
                    made = mask(heads, (rows, columns))
                    block.attn = MaskedAttention(dim, heads, made, num_prefix=1)
        xavier_normal_init(self)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):  # Linear in the other hosts' released code
                nn.init.xavier_normal_(part.weight)
            elif isinstance(part, nn.LayerNorm):
                part.eps = 1e-5
        nn.init.normal_(self.pos_embed)
        nn.init.normal_(self.cls_token, std=2**0.5)  # a token and its position, 1 each

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images to (B, 1 + N, D), the class token first; timm's gives that alone."""
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        patches, first = self.transformers((x, self.cls_token.expand(len(x), -1, -1)))
        return self.norm(torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1))


_NAMES = ("gmm_pit_patch2_32", "small_pit_patch2_32")
default_cfgs = cfgs_of(_NAMES, size=32, first_conv="patch_embed.conv")

# The released code's for 32x32 images: 96 wide, twice as wide after each pooling.
_SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "base_dims": (48, 48, 48), "depth": (2, 6, 4),
    "heads": (2, 4, 8), "mlp_ratio": 2,
}  # fmt: skip


def _create(name: str, pretrained: bool, given: dict[str, Any], mask: MakeMask | None) -> Any:
    arguments = {**_SIZES, **given, "mask": mask}
    return build_model(MaskedPit, name, pretrained, features=(0, 1, 2), **arguments)


@register_model
def gmm_pit_patch2_32(pretrained: bool = False, num_kernels: int = 5, **kwargs: Any) -> MaskedPit:
    """GMM-PiT."""
    mask = partial(GaussianMixture, num_kernels=num_kernels)
    return _create("gmm_pit_patch2_32", pretrained, kwargs, mask)


@register_model
def small_pit_patch2_32(pretrained: bool = False, **kwargs: Any) -> MaskedPit:
    """The paper's PiT without a mask."""
    return _create("small_pit_patch2_32", pretrained, kwargs, None)
