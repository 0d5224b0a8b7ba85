"""Swin: timm's, with a table of positions beside the relative ones and torch's own initialisation.

The mask multiplies the logits of a window before the relative positions and the mask of shifted
windows are added.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers.patch_embed import PatchEmbed
from timm.layers.weight_init import trunc_normal_
from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn, zeros

from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.methods.gmm_attention._mask import GaussianMixture, Host, MakeMask, masked


class PlacedPatches(PatchEmbed):
    """Patches with a learned position each: (B, 3, H, W) to (B, h, w, D)."""

    def __init__(self, *, embed_dim: int, **arguments: Any) -> None:
        super().__init__(embed_dim=embed_dim, **arguments)
        self.pos_embed = nn.Parameter(zeros(1, *self.grid_size, embed_dim))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.pos_embed


class MaskedWindowAttention(WindowAttention):
    """timm's attention in windows, its logits multiplied by a mask of the window's places."""

    def __init__(self, like: WindowAttention, mask: MakeMask) -> None:
        rows, columns = like.window_size
        window = (int(rows), int(columns))
        super().__init__(like.dim, like.num_heads, window_size=window)
        self.multiplier = mask(like.num_heads, window)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B * windows, N, D). mask: timm's, (windows, N, N), added where windows wrap round."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = masked(q * self.scale @ k.transpose(-2, -1), self.multiplier)
        logits = logits + self._get_rel_pos_bias()
        if mask is not None:
            apart = logits.unflatten(0, (-1, len(mask)))  # (B, windows, H, N, N)
            logits = (apart + mask[:, None]).flatten(0, 1)
        out = logits.softmax(-1).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class MaskedSwin(Host, SwinTransformer):
    """`mask` makes one for the heads and window of a layer, None for none."""

    def __init__(self, *, mask: MakeMask | None, **arguments: Any) -> None:
        super().__init__(embed_layer=PlacedPatches, weight_init="skip", **arguments)
        if mask is None:
            return
        for block in list(self.modules()):
            if isinstance(block, SwinTransformerBlock):
                block.attn = MaskedWindowAttention(block.attn, mask)


_NAMES = ("gmm_swin_patch2_32", "small_swin_patch2_32")
default_cfgs = cfgs_of(_NAMES, size=32, first_conv="patch_embed.proj", classifier="head.fc")

# The released code's for 32x32 images.
_SIZES: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 96, "depths": (2, 6, 4),
    "num_heads": (3, 6, 12), "mlp_ratio": 2, "drop_path_rate": 0.0,
}  # fmt: skip


def _create(name: str, pretrained: bool, given: dict[str, Any], mask: MakeMask | None) -> Any:
    arguments = {**_SIZES, **given, "mask": mask}
    return build_model(MaskedSwin, name, pretrained, features=(0, 1, 2), **arguments)


@register_model
def gmm_swin_patch2_32(pretrained: bool = False, num_kernels: int = 5, **kwargs: Any) -> MaskedSwin:
    """GMM-Swin."""
    mask = partial(GaussianMixture, num_kernels=num_kernels)
    return _create("gmm_swin_patch2_32", pretrained, kwargs, mask)


@register_model
def small_swin_patch2_32(pretrained: bool = False, **kwargs: Any) -> MaskedSwin:
    """The paper's Swin without a mask."""
    return _create("small_swin_patch2_32", pretrained, kwargs, None)
