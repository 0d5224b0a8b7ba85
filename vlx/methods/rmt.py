"""RMT: Retentive Networks Meet Vision Transformers (Fan et al., CVPR 2024).

A pyramid of four stages whose attention decays with the Manhattan distance of two places, by a
fixed rate of each head. Early stages attend along rows and then along columns, which costs as much
as their sum. A depth-wise convolution of the values is added to what attention gives, another one
starts each block, a third sits in the feed-forward network.

B batch, N = h*w places of a stage, n heads, d width of a head, C = n*d.
Departures: as in the released code the decay is added to the logits, before the softmax; the
paper's formula multiplies the weights after it (`method.decay=weights`). Token labelling (the
starred results) is left out: its dense labels come from another model's files. The paper's FLOPs
are multiply-accumulates in units of 2^30.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from timm.layers.drop import DropPath
from timm.models import register_model
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from vlx.blocks.init import trunc_normal_init
from vlx.blocks.pyramid import Pyramid, build_pyramid, check_stages
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.core.errors import ConfigError
from vlx.core.paper import Paper
from vlx.core.released import Renames, next_stage, renamed
from vlx.families.backbone import BackboneClassifier, stage_arguments
from vlx.families.configs.classifier import StagesConfig
from vlx.ops.distance import line_distances, manhattan_distances
from vlx.ops.tokens import map_to_tokens, tokens_to_map

PAPER = Paper(
    number=74,
    slug="rmt",
    title="RMT: Retentive Networks Meet Vision Transformers",
    year=2024,
    venue="CVPR",
    url="https://arxiv.org/abs/2309.11523",
    family="backbone",
    commands=("finetune",),
    modalities=("image",),
    trainable_params=26_967_240,
    gmacs=4.78,
    backbones=("rmt_tiny", "rmt_small", "rmt_base", "rmt_large"),
)


class DecayPlace(Enum):
    """Where the distance acts."""

    logits = "logits"
    weights = "weights"
    nowhere = "nowhere"


@dataclass(kw_only=True)
class RmtConfig(StagesConfig):
    decay: DecayPlace = DecayPlace.logits
    """logits: added before the softmax, as the released code does. weights: multiplied after it and
    not normalised again, as the paper writes. nowhere: plain attention, for comparison."""
    head_ranges: list[float] | None = None
    """r of each stage: head i of n decays by 1 - 2^(-2 - r*i/n) a step; null keeps the model's."""
    ffn_ratios: list[float] | None = None
    """Width of the feed-forward network over that of the stage; null keeps the model's."""
    decomposed: list[bool] | None = None
    """Stages that attend along rows, then columns; null keeps the model's."""
    projection: int = 1024
    """Width of the layer before the classifier. Released code: 1024."""


class Positions(NamedTuple):
    """What attention knows of a map's places."""

    size: tuple[int, int]
    sin: Tensor
    """(N, d), with `cos` the rotation of queries and keys."""
    cos: Tensor
    biases: tuple[Tensor, ...]
    """Distance times log gamma: (n, N, N), or (n, w, w) of rows and (n, h, h) of columns."""


class Decay(nn.Module):
    """Rates of the heads and angles of the rotation; nothing here is trained or saved."""

    log_gamma: Tensor
    angle: Tensor

    def __init__(self, dim: int, heads: int, *, head_range: float, place: DecayPlace) -> None:
        super().__init__()
        shares = torch.arange(heads, dtype=torch.float32) / heads
        log_gamma = torch.log(1 - 2 ** (-2 - head_range * shares))
        if place is DecayPlace.nowhere:
            log_gamma = torch.zeros_like(log_gamma)
        angle = 10000.0 ** -torch.linspace(0, 1, dim // heads // 2)
        self.register_buffer("log_gamma", log_gamma, persistent=False)
        self.register_buffer("angle", angle.repeat_interleave(2), persistent=False)

    def forward(self, size: tuple[int, int], decomposed: bool) -> Positions:
        """size: (h, w). A place's number for the rotation is its raster index, in both forms."""
        device = self.angle.device
        index = torch.arange(size[0] * size[1], dtype=torch.float32, device=device)
        turn = index[:, None] * self.angle  # (N, d)
        if decomposed:
            distances = (line_distances(size[1], device), line_distances(size[0], device))
        else:
            distances = (manhattan_distances(size, device),)
        rate = self.log_gamma[:, None, None]
        return Positions(size, turn.sin(), turn.cos(), tuple(rate * each for each in distances))


def rotate(x: Tensor, at: Positions) -> Tensor:
    """Pairs of neighbouring channels turned by their place's angles. x: (B, N, n, d)."""
    first, second = x[..., ::2], x[..., 1::2]
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    # In float32: a raster index of thousands has no exact place in bf16.
    return (x * at.cos[:, None] + turned * at.sin[:, None]).to(x.dtype)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def decayed_logits(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v. q, k, v: (B, n, L, d); bias: (n, L, L)."""
    return scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None])


def decayed_weights(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """(softmax(q k^T / sqrt(d)) * exp(bias)) v: the rows do not sum to one."""
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights * bias.exp()).to(v.dtype) @ v


def attend_whole(q: Tensor, k: Tensor, v: Tensor, at: Positions, attend: Attend) -> Tensor:
    """Every place to every place. q, k, v: (B, N, n, d); returns the same shape."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return attend(q, k, v, at.biases[0]).transpose(1, 2)


def attend_decomposed(q: Tensor, k: Tensor, v: Tensor, at: Positions, attend: Attend) -> Tensor:
    """Along rows, then along columns of what the rows gave. Shapes as of `attend_whole`."""
    q, k, v = (part.unflatten(1, at.size) for part in (q, k, v))  # (B, h, w, n, d)
    for bias in at.biases:
        lines = [part.flatten(0, 1).transpose(1, 2) for part in (q, k, v)]  # (B*h, n, w, d)
        out = attend(*lines, bias).transpose(1, 2).unflatten(0, v.shape[:2])
        # The other axis next; after two turns the map lies as it did.
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), out.transpose(1, 2)
    return v.flatten(1, 2)


class DepthwiseConv(nn.Conv2d):
    """k x k, one filter a channel, on tokens."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x: (B, N, C) on a map of `size`."""
        return map_to_tokens(super().forward(tokens_to_map(x, size)))


class ManhattanAttention(nn.Module):
    """Attention under a decay, plus the convolved values (LePE)."""

    def __init__(self, dim: int, heads: int, *, decomposed: bool, place: DecayPlace) -> None:
        super().__init__()
        self.heads = heads
        self.mix = attend_decomposed if decomposed else attend_whole
        self.attend = decayed_weights if place is DecayPlace.weights else decayed_logits
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.lepe = DepthwiseConv(dim, 5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        v = self.v(x)
        q = rotate(self.q(x).unflatten(2, (self.heads, -1)), at)
        k = rotate(self.k(x).unflatten(2, (self.heads, -1)), at)
        out = self.mix(q, k, v.unflatten(2, (self.heads, -1)), at, self.attend)
        return self.proj(out.flatten(2) + self.lepe(v, at.size))


class ConvFeedForward(nn.Module):
    """Two linear layers with a residual 3x3 depth-wise convolution between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.conv = nn.Linear(dim, hidden), DepthwiseConv(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = gelu(self.fc1(x))
        return self.fc2(x + self.conv(x, size))


class RmtBlock(nn.Module):
    """Convolved position, attention, feed-forward network, each residual."""

    def __init__(
        self, dim: int, attn: ManhattanAttention, *, hidden: int, drop_path: float, scale: bool
    ) -> None:
        super().__init__()
        self.pos = DepthwiseConv(dim, 3)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.ffn = attn, ConvFeedForward(dim, hidden)
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if scale:  # not 1-D: the released code decays them
            self.gamma1 = nn.Parameter(torch.full((1, 1, dim), 1e-6))
            self.gamma2 = nn.Parameter(torch.full((1, 1, dim), 1e-6))

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        x = x + self.pos(x, at.size)
        out = self.attn(self.norm1(x), at)
        x = x + self.drop_path(out if self.gamma1 is None else self.gamma1 * out)
        out = self.ffn(self.norm2(x), at.size)
        return x + self.drop_path(out if self.gamma2 is None else self.gamma2 * out)


def stem(in_dim: int, dim: int, stride: int) -> nn.Sequential:
    """Four 3x3 convolutions with BatchNorm, GELU between; stride 4, 2 or 1 in all."""
    if stride not in (1, 2, 4):
        raise ConfigError(f"the first stage of RMT has a stride of 1, 2 or 4, not {stride}")
    half = dim // 2
    steps = ((in_dim, half, 1 if stride == 1 else 2), (half, half, 1))
    steps += ((half, dim, 2 if stride == 4 else 1), (dim, dim, 1))
    layers: list[nn.Module] = []
    for before, after, step in steps:
        layers += [nn.Conv2d(before, after, 3, step, 1), nn.BatchNorm2d(after), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class RmtStage(nn.Module):
    """Stem or downsampling, then blocks that share the decay."""

    def __init__(self, down: nn.Module, decay: Decay, blocks: list[RmtBlock], whole: bool) -> None:
        super().__init__()
        self.down, self.decay, self.decomposed = down, decay, not whole
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = self.down(x)
        at = self.decay((x.shape[2], x.shape[3]), self.decomposed)
        x = map_to_tokens(x)
        for block in self.blocks:
            x = block(x, at)
        return tokens_to_map(x, at.size), None


_RELEASED: Renames = (
    (r"^patch_embed\.proj\.", "stages.0.down."),
    (r"^layers\.(\d)\.downsample\.reduction\.", next_stage("down.0.")),
    (r"^layers\.(\d)\.downsample\.norm\.", next_stage("down.1.")),
    (r"\.Relpos\.", None),  # made anew from the sizes
    (r"^layers\.(\d)\.", r"stages.\1."),
    (r"\.retention_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.retention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.retention\.out_proj\.", ".attn.proj."),
    (r"\.retention\.lepe\.conv\.", ".attn.lepe."),
    (r"\.ffn\.dwconv\.conv\.", ".ffn.conv."),
    (r"\.pos\.conv\.", ".pos."),
    (r"\.gamma_([12])$", r".gamma\1"),
)


class Rmt(Pyramid):
    """The backbone; sequences have one entry a stage. `forward_features` gives (B, C, h, w).

    drop_path_rate: of the last block, rising from 0 over all. layer_scales: stages whose residuals
    are scaled by learned factors, 1e-6 at first.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        *,
        head_ranges: Sequence[float],
        ffn_ratios: Sequence[float],
        decomposed: Sequence[bool],
        layer_scales: Sequence[bool],
        strides: Sequence[int] = (4, 2, 2, 2),
        decay: DecayPlace = DecayPlace.logits,
        projection: int = 1024,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(embed_dims)
        scales = list(layer_scales)[-stages:]  # of fewer stages, the last ones'
        sizes = {"dims": embed_dims, "depths": depths, "heads": num_heads, "strides": strides}
        sizes |= {"head_ranges": head_ranges, "ffn_ratios": ffn_ratios, "decomposed": decomposed}
        check_stages("RMT", **sizes)
        self.describe(embed_dims, strides, num_classes=num_classes, hidden=projection)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads)):
            if dim % (2 * heads):
                raise ConfigError(f"{dim} channels do not make {heads} heads of an even width")
            blocks = [
                RmtBlock(
                    dim,
                    ManhattanAttention(dim, heads, decomposed=decomposed[i], place=decay),
                    hidden=int(ffn_ratios[i] * dim),
                    drop_path=next(rates),
                    scale=scales[i],
                )
                for _ in range(depths[i])
            ]
            down = stem(in_chans, dim, strides[0])
            if i:
                conv = nn.Conv2d(embed_dims[i - 1], dim, 3, strides[i], 1)
                down = nn.Sequential(conv, nn.BatchNorm2d(dim))
            law = Decay(dim, heads, head_range=head_ranges[i], place=decay)
            self.stages.append(RmtStage(down, law, blocks, whole=not decomposed[i]))
        self.proj = nn.Linear(embed_dims[-1], projection)
        self.norm = nn.BatchNorm1d(projection)
        self.head = self.make_head(num_classes)
        trunc_normal_init(self)  # over the attention's own Xavier gain, as in the released code

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the official names."""
        found = renamed(state, _RELEASED)
        for name, value in found.items():
            if ".gamma" in name:
                found[name] = value.reshape(1, 1, -1)
        return found

    def finish(self, x: Tensor, cls_token: Tensor | None) -> Tensor:
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Every place is projected, normalised and activated before the mean."""
        tokens = self.proj(map_to_tokens(x)).transpose(1, 2)  # (B, 1024, N)
        pooled = silu(self.norm(tokens)).mean(2)
        return pooled if pre_logits else self.head(pooled)


default_cfgs = cfgs_of(PAPER.backbones, first_conv="stages.0.down.0")

_NARROW: dict[str, Any] = {
    "embed_dims": (64, 128, 256, 512),
    "num_heads": (4, 4, 8, 16),
    "head_ranges": (4, 4, 6, 6),
    "layer_scales": (False, False, False, False),
}
_DEEP: dict[str, Any] = {
    "depths": (4, 8, 25, 8),
    "ffn_ratios": (4, 4, 3, 3),
    "decomposed": (True, True, True, False),
    "layer_scales": (False, False, True, True),
}


@register_model
def rmt_tiny(pretrained: bool = False, **kwargs: Any) -> Rmt:
    """RMT-T (T3 in the released code): 14.3 M parameters, 2.64 GMACs at 224."""
    sizes = {**_NARROW, "depths": (2, 2, 8, 2), "ffn_ratios": (3, 3, 3, 3)}
    sizes["decomposed"] = (True, True, False, False)
    return build_pyramid(Rmt, "rmt_tiny", pretrained, **{**sizes, **kwargs})


@register_model
def rmt_small(pretrained: bool = False, **kwargs: Any) -> Rmt:
    """RMT-S: 27.0 M parameters, 4.78 GMACs at 224."""
    sizes = {**_NARROW, "depths": (3, 4, 18, 4), "ffn_ratios": (4, 4, 3, 3)}
    sizes["decomposed"] = (True, True, True, False)
    return build_pyramid(Rmt, "rmt_small", pretrained, **{**sizes, **kwargs})


@register_model
def rmt_base(pretrained: bool = False, **kwargs: Any) -> Rmt:
    """RMT-B (M2 in the released code): 54.2 M parameters, 10.37 GMACs at 224."""
    sizes = {**_DEEP, "embed_dims": (80, 160, 320, 512), "num_heads": (5, 5, 10, 16)}
    sizes["head_ranges"] = (5, 5, 6, 6)
    return build_pyramid(Rmt, "rmt_base", pretrained, **{**sizes, **kwargs})


@register_model
def rmt_large(pretrained: bool = False, **kwargs: Any) -> Rmt:
    """RMT-L (L6 in the released code): 95.5 M parameters, 19.49 GMACs at 224."""
    sizes = {**_DEEP, "embed_dims": (112, 224, 448, 640), "num_heads": (7, 7, 14, 20)}
    sizes["head_ranges"] = (6, 6, 6, 6)
    return build_pyramid(Rmt, "rmt_large", pretrained, **{**sizes, **kwargs})


class RmtClassifier(BackboneClassifier):
    Config = RmtConfig
    Backbone = Rmt
    models = PAPER.backbones

    @classmethod
    def encoder_arguments(cls, cfg: RmtConfig) -> Mapping[str, Any]:
        by_stage = {
            "head_ranges": cfg.head_ranges,
            "ffn_ratios": cfg.ffn_ratios,
            "decomposed": cfg.decomposed,
        }
        given = {name: list(value) for name, value in by_stage.items() if value is not None}
        return {
            **stage_arguments(cfg), **given, "decay": cfg.decay, "projection": cfg.projection,
        }  # fmt: skip


METHOD = RmtClassifier
