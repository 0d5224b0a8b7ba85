"""GMM attention: RetNet Viewed through Convolution (Li and Li, Pattern Recognition 2024).

Before the softmax the logits of every head are multiplied by a mask of the distance of two patches:
a mixture of K Gaussians around distance 0, each with a learned amplitude and width. It costs 2K
parameters a head and layer. The class token is left out and the tokens are averaged.

B batch, N patches, H heads, K Gaussians.
Backbones beside `gmm_vit_patch4_32`: `elm_vit_patch4_32`, whose mask has N*N learned entries for
all heads of a layer; `small_vit_patch4_32`, the paper's baseline without a mask and with a class
token; `mean_vit_patch4_32`, without either, so that the mask is not compared with the pooling.
Departures: only the ViT of the paper's five hosts; RandAugment in place of AutoAugment's CIFAR
policy; boxes are erased with noise, not the mean colour. A Gaussian is computed from the distance:
the released code takes powers of exp(-d^2/2), which underflow beyond a distance of 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlx.blocks.init import xavier_normal_init
from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.core.config import ClassifierConfig
from vlx.core.errors import ConfigError
from vlx.core.method import Builder, ParamGroup
from vlx.core.paper import Paper
from vlx.families.backbone import BackboneClassifier
from vlx.ops.distance import squared_distances

PAPER = Paper(
    number=76,
    slug="gmm-attention",
    title="Toward a Deeper Understanding: RetNet Viewed through Convolution",
    year=2024,
    venue="Pattern Recognition",
    url="https://arxiv.org/abs/2309.05375",
    family="backbone",
    commands=("finetune",),
    modalities=("image",),
    trainable_params=2_693_122,
    num_classes=10,
    backbones=(
        "gmm_vit_patch4_32",
        "elm_vit_patch4_32",
        "small_vit_patch4_32",
        "mean_vit_patch4_32",
    ),
)


@dataclass(kw_only=True)
class GmmAttentionConfig(ClassifierConfig):
    num_kernels: int | None = None
    """Gaussians of each head and layer; null keeps the model's 5, as the paper. For gmm_vit alone.
    """
    mix_probability: float = 0.5
    """Probability that a step mixes at all; then mixup or CutMix, each half the time. Released
    code: 0.5."""
    mixup: float = 1.0
    """Alpha of mixup; 0 for none. Released code: 1."""
    crop_padding: int | None = 4
    """Pad by so many pixels and cut a random window; null takes crop_scale. Released code: 4."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if not 0.0 <= self.mix_probability <= 1.0:
            raise ConfigError(f"method.mix_probability={self.mix_probability} must lie in 0..1")
        if self.num_kernels is not None and self.num_kernels < 1:
            raise ConfigError(f"method.num_kernels={self.num_kernels} must be 1 or more")


class GaussianMixture(nn.Module):
    """The mask of one layer: sum over k of alpha_k exp(-d^2 / (2 (sigma_k^2 + 1e-5)))."""

    squared: Tensor

    def __init__(self, heads: int, grid: tuple[int, int], *, num_kernels: int) -> None:
        super().__init__()
        shape = (num_kernels, heads, 1, 1)
        self.sigma = nn.Parameter(10 * torch.randn(shape) + 10)  # in patches; enters squared
        self.alpha = nn.Parameter(2 * torch.randn(shape))  # of either sign
        self.register_buffer("squared", squared_distances(grid), persistent=False)

    def forward(self) -> Tensor:
        """(H, N, N)."""
        width = 2 * (self.sigma.square() + 1e-5)
        return (self.alpha * torch.exp(-self.squared / width)).sum(0)


class ElementwiseMask(nn.Module):
    """The paper's baseline mask: one entry for every pair of patches, the same for all heads."""

    def __init__(self, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        patches = grid[0] * grid[1]
        self.entries = nn.Parameter(torch.zeros(patches, patches))  # uniform attention at first

    def forward(self) -> Tensor:
        """(N, N)."""
        return self.entries


class MaskedAttention(Attention):
    """timm's attention, its logits multiplied by a mask. A small entry is no mask in the other
    sense: it brings the logit to 0, which is attended as much as any other 0."""

    def __init__(self, dim: int, heads: int, mask: nn.Module) -> None:
        super().__init__(dim, heads, qkv_bias=False)
        self.mask = mask

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x: (B, N, D); the other arguments are timm's and must be left alone."""
        assert attn_mask is None
        assert not is_causal
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, d)
        logits = self.mask() * (q * self.scale @ k.transpose(-2, -1))
        out = logits.softmax(-1).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


MakeMask = Callable[[int, tuple[int, int]], nn.Module]


class MaskedVit(VisionTransformer):
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
        for block in self.blocks:
            block.drop_path1 = DropPath(drop_path_rate)
            block.drop_path2 = DropPath(drop_path_rate)
            if mask is not None:
                block.attn = MaskedAttention(self.embed_dim, heads, mask(heads, grid))
        xavier_normal_init(self)
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                nn.init.normal_(table)

    def no_weight_decay(self) -> set[str]:
        """Nothing: the released code decays all parameters."""
        return set()


default_cfgs = cfgs_of(PAPER.backbones, size=32, first_conv="patch_embed.proj")

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


class GmmAttention(BackboneClassifier):
    Config = GmmAttentionConfig
    Backbone = MaskedVit
    models = PAPER.backbones

    def __init__(self, cfg: GmmAttentionConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.mixing = replace(self.mixing, p=cfg.mix_probability)

    @classmethod
    def encoder_arguments(cls, cfg: GmmAttentionConfig) -> Mapping[str, Any]:
        return {} if cfg.num_kernels is None else {"num_kernels": cfg.num_kernels}

    def param_groups(self) -> list[ParamGroup]:
        """All parameters are decayed, masks, biases and norms too, as in the released code."""
        return [ParamGroup("decay", list(self.named_parameters()))]


METHOD = GmmAttention
