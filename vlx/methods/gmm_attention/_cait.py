"""CaiT: timm's around the released code's attention, which has talking heads everywhere.

The mask multiplies the logits of the patches' attention before the heads talk; the class token's
attention has none.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models import register_model
from timm.models.cait import Cait, LayerScaleBlock, LayerScaleBlockClassAttn
from torch import Tensor, nn

from vlx.blocks.init import xavier_normal_init
from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.methods.gmm_attention._mask import GaussianMixture, Host, MakeMask, drop_alike, masked


class TalkingHeads(nn.Module):
    """Attention whose maps are mixed over the heads before and after the softmax.

    Takes what timm's CaiT gives its attention. The width of a head is free of dim / heads.
    """

    def __init__(self, dim: int, num_heads: int, *, head_dim: int, **_: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, head_dim**-0.5
        inner = num_heads * head_dim
        self.q = nn.Linear(dim, inner, bias=False)
        self.kv = nn.Linear(dim, 2 * inner, bias=False)
        self.mix_logits = nn.Parameter(torch.randn(num_heads, num_heads))
        self.mix_weights = nn.Parameter(torch.randn(num_heads, num_heads))
        self.proj = nn.Linear(inner, dim)
        self.mask: nn.Module | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, N, D) queries; context: (B, M, D) keys and values, None for `x` itself."""
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, d)
        kv = self.kv(x if context is None else context).unflatten(2, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        logits = masked(q * self.scale @ k.transpose(-2, -1), self.mask)
        weights = _talk(logits, self.mix_logits).softmax(-1)
        out = _talk(weights, self.mix_weights).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


def _talk(maps: Tensor, mix: Tensor) -> Tensor:
    """maps: (B, H, N, M), mix: (H, G); (B, G, N, M)."""
    return torch.einsum("bhnm,hg->bgnm", maps, mix)


class ClassBlock(LayerScaleBlockClassAttn):
    """timm's, but the class token attends to the patches alone, which come as they are: unnormed
    and without the class token among them."""

    def forward(self, x: Tensor, x_cls: Tensor) -> Tensor:
        """x: (B, N, D), x_cls: (B, 1, D), returned alike."""
        x_cls = x_cls + self.drop_path(self.gamma_1 * self.attn(self.norm1(x_cls), x))
        return x_cls + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x_cls)))


def layer_scale(layer: int) -> float:
    """Where the layer scale of a layer (0 = first) starts. Released code."""
    return 0.1 if layer < 18 else 1e-5 if layer < 24 else 1e-6


class MaskedCait(Host, Cait):
    """`mask` makes one for the heads and grid of a layer, None for none.

    mlp_dim: hidden width of all MLPs. drop_path_rate: of every block alike.
    """

    def __init__(
        self,
        *,
        mask: MakeMask | None,
        embed_dim: int,
        head_dim: int,
        mlp_dim: int,
        drop_path_rate: float = 0.0,
        **arguments: Any,
    ) -> None:
        attention = partial(TalkingHeads, head_dim=head_dim)
        ratio = (mlp_dim + 0.5) / embed_dim  # timm rounds down
        super().__init__(
            embed_dim=embed_dim,
            mlp_ratio=ratio,
            mlp_ratio_token_only=ratio,
            attn_block=attention,  # type: ignore[arg-type]
            attn_block_token_only=attention,  # type: ignore[arg-type]
            block_layers_token=ClassBlock,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),  # type: ignore[arg-type]
            **arguments,
        )
        xavier_normal_init(self)
        for table in (self.pos_embed, self.cls_token):
            nn.init.normal_(table)  # type: ignore[arg-type]
        for blocks in (self.blocks, self.blocks_token_only):
            assert blocks is not None
            drop_alike(blocks, drop_path_rate)
            for layer, block in enumerate(blocks):
                assert isinstance(block, LayerScaleBlock | LayerScaleBlockClassAttn)
                nn.init.constant_(block.gamma_1, layer_scale(layer))
                nn.init.constant_(block.gamma_2, layer_scale(layer))
        if mask is not None:
            assert isinstance(self.patch_embed, PatchEmbed)
            for block in self.blocks:
                assert isinstance(block.attn, TalkingHeads)
                block.attn.mask = mask(block.attn.num_heads, self.patch_embed.grid_size)


_NAMES = ("gmm_cait_patch4_32", "small_cait_patch4_32")
default_cfgs = cfgs_of(_NAMES, size=32, first_conv="patch_embed.proj")

# The released code's "cait-tiny", whose figures are those of the readme's CaiT; its "cait" is 192
# wide and has 9.0 M parameters.
_SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 108, "depth": 24, "depth_token_only": 2,
    "num_heads": 4, "head_dim": 64, "mlp_dim": 384,
}  # fmt: skip


def _create(name: str, pretrained: bool, given: dict[str, Any], mask: MakeMask | None) -> Any:
    arguments = {**_SIZES, **given, "mask": mask}
    return build_model(MaskedCait, name, pretrained, features=3, **arguments)


@register_model
def gmm_cait_patch4_32(pretrained: bool = False, num_kernels: int = 5, **kwargs: Any) -> MaskedCait:
    """GMM-CaiT."""
    mask = partial(GaussianMixture, num_kernels=num_kernels)
    return _create("gmm_cait_patch4_32", pretrained, kwargs, mask)


@register_model
def small_cait_patch4_32(pretrained: bool = False, **kwargs: Any) -> MaskedCait:
    """The paper's CaiT without a mask."""
    return _create("small_cait_patch4_32", pretrained, kwargs, None)
