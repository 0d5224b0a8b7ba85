"""CvT: Introducing Convolutions to Vision Transformers (Wu et al., ICCV 2021).

A pyramid of three stages. Each re-embeds the map by an overlapping strided convolution; in its
blocks a depth-wise convolution precedes the linear projections to queries, keys and values, with
stride 2 for the last two. There is no position embedding; a class token exists in the last stage.

B batch, C width of a stage, N tokens of its map, P 1 in the last stage and 0 before.
As in the reference's code the logits are scaled by the width of the stage, not of a head, and the
MLP's activation is QuickGELU (transformers' port has GELU: `act_layer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.activations import QuickGELU
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from timm.models import register_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vlx.blocks.init import trunc_normal_init
from vlx.blocks.pyramid import Pyramid, build_pyramid, check_stages
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.core.errors import ConfigError
from vlx.core.paper import Paper
from vlx.core.released import Renames, renamed
from vlx.families.backbone import BackboneClassifier, stage_arguments
from vlx.families.configs.classifier import StagesConfig
from vlx.ops.tokens import map_to_tokens, tokens_to_map

PAPER = Paper(
    number=8,
    slug="cvt",
    title="CvT: Introducing Convolutions to Vision Transformers",
    year=2021,
    venue="ICCV",
    url="https://arxiv.org/abs/2103.15808",
    family="backbone",
    commands=("finetune",),
    modalities=("image",),
    trainable_params=19_997_480,
    gmacs=4.57,
    backbones=("cvt_13", "cvt_21", "cvt_w24"),
    waive=(
        (
            "gradients",
            "the head reads the class token, which skips the convolutions: those of the last "
            "block's queries change nothing",
        ),
    ),
)


@dataclass(kw_only=True)
class CvtConfig(StagesConfig):
    kv_stride: int = 2
    """Stride of the convolution before keys and values. Paper: 2; 1 costs half as much again."""

    def __post_init__(self) -> None:
        StagesConfig.__post_init__(self)
        if self.kv_stride < 1:
            raise ConfigError(f"method.kv_stride={self.kv_stride} must be 1 or more")


class ConvEmbed(nn.Module):
    """Overlapping strided convolution and LayerNorm: a map to the tokens of the next stage."""

    def __init__(self, in_dim: int, dim: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        padding = 2 if kernel == 7 else 1  # the reference's: not 3, so that 224 gives 56
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C', h', w') to tokens (B, N, C) and their (h, w)."""
        x = self.proj(x)
        return self.norm(map_to_tokens(x)), (x.shape[2], x.shape[3])


def depthwise(dim: int, stride: int) -> nn.Sequential:
    """3x3, one filter a channel, then BatchNorm and no activation: the linear layer after it is
    the point-wise half of a separable convolution."""
    conv = nn.Conv2d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim))


class ConvAttention(nn.Module):
    """Attention whose queries, keys and values are convolved before their linear layers."""

    def __init__(self, dim: int, heads: int, *, kv_stride: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.conv_q = depthwise(dim, 1)
        self.conv_k, self.conv_v = depthwise(dim, kv_stride), depthwise(dim, kv_stride)
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x: (B, P + N, C), normed; size: (h, w) of its N last tokens. Prefixes skip the
        convolutions."""
        prefix = x[:, : x.shape[1] - size[0] * size[1]]
        grid = tokens_to_map(x[:, prefix.shape[1] :], size)

        def project(conv: nn.Module, linear: nn.Module) -> Tensor:
            tokens = torch.cat([prefix, map_to_tokens(conv(grid))], dim=1)
            return linear(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, M, d)

        q, k, v = (
            project(self.conv_q, self.q),
            project(self.conv_k, self.k),
            project(self.conv_v, self.v),
        )
        out = scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class CvtBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(
        self, dim: int, heads: int, *, kv_stride: int, act_layer: type[nn.Module], drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ConvAttention(dim, heads, kv_stride=kv_stride)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, act_layer=act_layer)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CvtStage(nn.Module):
    """Embedding and blocks; the last stage of a model has a class token."""

    def __init__(self, embed: ConvEmbed, blocks: list[CvtBlock], *, cls_token: bool) -> None:
        super().__init__()
        self.embed = embed
        self.cls_token = None
        if cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed.proj.out_channels))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, size = self.embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, size)
        if self.cls_token is None:
            return tokens_to_map(x, size), None
        return tokens_to_map(x[:, 1:], size), x[:, :1]


_MICROSOFT: Renames = (
    (r"^stage(\d)\.patch_embed\.", r"stages.\1.embed."),
    (r"^stage(\d)\.", r"stages.\1."),
    (r"\.attn\.conv_proj_([qkv])\.conv\.", r".attn.conv_\1.0."),
    (r"\.attn\.conv_proj_([qkv])\.bn\.", r".attn.conv_\1.1."),
    (r"\.attn\.proj_([qkv])\.", r".attn.\1."),
)
_ROLES = {"query": "q", "key": "k", "value": "v"}
_HUGGING_FACE: Renames = (
    (r"^cvt\.", ""),
    (r"^encoder\.stages\.(\d)\.", r"stages.\1."),
    (r"\.embedding\.convolution_embeddings\.projection\.", ".embed.proj."),
    (r"\.embedding\.convolution_embeddings\.normalization\.", ".embed.norm."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (
        r"\.attention\.attention\.convolution_projection_(\w+)\.convolution_projection\.(\w+)\.",
        lambda m: f".attn.conv_{_ROLES[m[1]]}.{int(m[2] == 'normalization')}.",
    ),
    (
        r"\.attention\.attention\.projection_(\w+)\.",
        lambda m: f".attn.{_ROLES[m[1]]}.",
    ),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


class Cvt(Pyramid):
    """The backbone. embed_dims, depths, num_heads, strides: one entry a stage.

    drop_path_rate: of the last block; it rises from 0 over the blocks of the last stage alone.
    `forward_features` gives (B, 1 + N, C): class token and tokens of the last stage, normed.
    """

    pools = ("token", "avg")
    num_prefix_tokens = 1

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        *,
        strides: Sequence[int] = (4, 2, 2),
        kv_stride: int = 2,
        act_layer: type[nn.Module] = QuickGELU,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_stages("CvT", dims=embed_dims, depths=depths, heads=num_heads, strides=strides)
        self.describe(embed_dims, strides, num_classes=num_classes, hidden=embed_dims[-1])
        stages = []
        for number, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads)):
            last = number == len(embed_dims) - 1
            rates = torch.linspace(0, drop_path_rate if last else 0.0, depth, device="cpu")
            blocks = [
                CvtBlock(dim, heads, kv_stride=kv_stride, act_layer=act_layer, drop_path=rate)
                for rate in rates.tolist()
            ]
            embed = ConvEmbed(
                embed_dims[number - 1] if number else in_chans,
                dim,
                kernel=7 if strides[number] == 4 else 3,
                stride=strides[number],
            )
            stages.append(CvtStage(embed, blocks, cls_token=last))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(embed_dims[-1])
        self.head = self.make_head(num_classes)
        trunc_normal_init(self)  # convolutions keep torch's default
        trunc_normal_(stages[-1].cls_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {f"stages.{len(self.stages) - 1}.cls_token"}

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From Microsoft's names or Hugging Face's."""
        theirs = any(".convolution_projection_query." in name for name in state)
        return renamed(state, _HUGGING_FACE if theirs else _MICROSOFT)

    def finish(self, x: Tensor, cls_token: Tensor | None) -> Tensor:
        assert cls_token is not None
        return self.norm(torch.cat([cls_token, map_to_tokens(x)], dim=1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1)
        return pooled if pre_logits else self.head(pooled)


default_cfgs = cfgs_of(PAPER.backbones, first_conv="stages.0.embed.proj")


def _create(name: str, pretrained: bool, sizes: Mapping[str, Any], given: dict[str, Any]) -> Cvt:
    return build_pyramid(Cvt, name, pretrained, **{**sizes, **given})


@register_model
def cvt_13(pretrained: bool = False, **kwargs: Any) -> Cvt:
    """CvT-13: 20.0 M parameters, 4.57 GMACs at 224."""
    sizes = {"embed_dims": (64, 192, 384), "depths": (1, 2, 10), "num_heads": (1, 3, 6)}
    return _create("cvt_13", pretrained, sizes, kwargs)


@register_model
def cvt_21(pretrained: bool = False, **kwargs: Any) -> Cvt:
    """CvT-21: 31.6 M parameters, 7.18 GMACs at 224."""
    sizes = {"embed_dims": (64, 192, 384), "depths": (1, 4, 16), "num_heads": (1, 3, 6)}
    return _create("cvt_21", pretrained, sizes, kwargs)


@register_model
def cvt_w24(pretrained: bool = False, **kwargs: Any) -> Cvt:
    """CvT-W24: 277.2 M parameters, 194.2 GMACs at 384."""
    sizes = {"embed_dims": (192, 768, 1024), "depths": (2, 2, 20), "num_heads": (3, 12, 16)}
    return _create("cvt_w24", pretrained, sizes, kwargs)


class CvtClassifier(BackboneClassifier):
    Config = CvtConfig
    Backbone = Cvt
    models = PAPER.backbones

    @classmethod
    def encoder_arguments(cls, cfg: CvtConfig) -> Mapping[str, Any]:
        return {**stage_arguments(cfg), "kv_stride": cfg.kv_stride}


METHOD = CvtClassifier
