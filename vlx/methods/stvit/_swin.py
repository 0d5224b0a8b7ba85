"""STViT-R on Swin: stage 3 runs on semantic tokens in between and gives the grid back."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.drop import calculate_drop_path_rates
from timm.models import build_model_with_cfg, register_model
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
)
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vlx.blocks.init import trunc_normal_init
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.blocks.vit_block import Signal, attend, cross_block
from vlx.core.errors import ConfigError
from vlx.methods.stvit._pooling import max_pool_grid

UNIT = 6
"""Layers of one unit: full, gather in windows, gather from all, local, global, recovery."""
MARGIN = 3
"""Places that a window's keys reach into its neighbours. Code: keys of 10x10 for windows of 7."""
_SCALE = 1e-5


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with BatchNorm and Hardswish, no norm after them.

    Takes what Swin gives its patch embedding. Images (B, 3, H, W) to (B, H/4, W/4, D).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        **_: Any,
    ) -> None:
        super().__init__()
        height, width = img_size if isinstance(img_size, tuple) else (img_size, img_size)
        if patch_size != 4:
            raise ConfigError(f"encoder.patch_size={patch_size}: STViT-R's stem makes patches of 4")
        self.img_size, self.patch_size = (height, width), (4, 4)
        self.grid_size = (height // 4, width // 4)
        layers: list[nn.Module] = []
        for source, out in ((in_chans, embed_dim // 2), (embed_dim // 2, embed_dim)):
            conv = nn.Conv2d(source, out, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.Hardswish()]
        self.proj = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).permute(0, 2, 3, 1)


def _layer(like: SwinTransformerBlock, heads: int, drop_path: float) -> Block:
    """A plain block of a Swin block's width, with layer scale on both branches."""
    block = Block(
        like.dim,
        heads,
        like.mlp_ratio,
        qkv_bias=True,
        init_values=_SCALE,
        drop_path=drop_path,
        norm_layer=nn.LayerNorm,  # type: ignore[arg-type] # Swin's eps, 1e-5
    )
    trunc_normal_init(block)
    return block


class SemanticUnit(nn.Module):
    """Six layers: x passes the first and the last, semantic tokens live in between.

    full: an unshifted Swin block. rates: stochastic depth of the other five. window_residual:
    whether the gathering in windows adds to the pooled tokens.
    """

    def __init__(
        self,
        full: SwinTransformerBlock,
        heads: int,
        token_side: int,
        rates: list[float],
        *,
        window_residual: bool,
    ) -> None:
        super().__init__()
        self.full, self.token_side, self.window_residual = full, token_side, window_residual
        self.window = full.window_size[0]
        blocks = [_layer(full, heads, rate) for rate in rates]
        self.gather_local, self.gather_global = blocks[:2]
        self.refine_local, self.refine_global = blocks[2:4]
        self.recover = blocks[4]

    def window_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of x (B, h, w, D), per window: the pooled tokens (B * windows, s*s, D), and the keys:
        these and a square that reaches over the window's border (B * windows, s*s + k*k, D)."""
        side = self.token_side
        inner = cut(x, self.window, 0)
        pooled = max_pool_grid(inner, side).flatten(1, 2)
        return pooled, torch.cat([pooled, cut(x, self.window, MARGIN).flatten(1, 2)], dim=1)

    def gather_windows(self, x: Tensor) -> Tensor:
        """Semantic tokens (B, windows * s*s, D), window by window, after the first gathering."""
        pooled, keys = self.window_tokens(x)
        tokens = cross_block(self.gather_local, pooled, keys, residual=self.window_residual)
        return tokens.reshape(len(x), -1, x.shape[-1])

    def forward(self, x: Tensor, centres: Tensor | None = None) -> Tensor:
        """x: (B, h, w, D), returned alike. centres (1, M, D): added to the queries that gather
        from all places."""
        x = self.full(x)
        patches = x.flatten(1, 2)  # (B, N, D)
        tokens = self.gather_windows(x)  # (B, M, D)
        queries = tokens if centres is None else tokens + centres
        tokens = cross_block(self.gather_global, queries, torch.cat([tokens, patches], dim=1))
        groups = tokens.reshape(-1, self.token_side**2, x.shape[-1])  # one window's
        tokens = self.refine_global(self.refine_local(groups).reshape_as(tokens))
        return cross_block(self.recover, patches, tokens).view_as(x)

    def attention_map(self, x: Tensor, centres: Tensor | None = None) -> Tensor:
        """Mean over heads of the map of the gathering from all places, (B, M, N)."""
        x = self.full(x)
        tokens, block = self.gather_windows(x), self.gather_global
        queries = tokens if centres is None else tokens + centres
        keys = torch.cat([tokens, x.flatten(1, 2)], dim=1)
        _, signals = attend(
            block.attn,  # type: ignore[arg-type]
            block.norm1(queries),
            context=block.norm1(keys),
            want=Signal.ATTN,
        )
        assert signals.attn is not None
        return signals.attn.mean(1)[..., tokens.shape[1] :]


def reach(length: int, window: int, margin: int) -> int:
    """Side of the square that `cut` gives, on a map of a side of `length`."""
    return min(length, window + margin * min(length // window - 1, 2))


def cut(x: Tensor, window: int, margin: int) -> Tensor:
    """x (B, h, w, D) in windows that overlap: (B * windows, k, k, D).

    Each reaches `margin` places over its borders, and as far again inwards where the map ends, so
    that all are of a size: 10 of 14 for two windows of 7 and a margin of 3, as in the code.
    """
    for axis in (1, 3):
        length = x.shape[axis]
        size = reach(length, window, margin)
        firsts = range(-margin, length - margin, window)
        inside = [min(max(first, 0), length - size) for first in firsts]
        x = torch.stack([x.narrow(axis, first, size) for first in inside], dim=axis)
    # (B, rows, k, columns, k, D)
    return x.transpose(2, 3).flatten(0, 2)


class SemanticStage(nn.Module):
    """Stage 3: units in place of a Swin stage's blocks, whose first of every six they keep."""

    def __init__(
        self,
        stage: SwinTransformerStage,
        token_side: int,
        start: str,
        rates: list[float],
        *,
        window_residual: bool,
    ) -> None:
        super().__init__()
        self.downsample = stage.downsample
        self.grad_checkpointing = False
        first = stage.blocks[0]
        assert isinstance(first, SwinTransformerBlock)
        self.size, window = stage.output_resolution, first.window_size[0]
        if stage.depth % UNIT:
            raise ConfigError(f"STViT-R's third stage has {stage.depth} layers, not units of 6")
        if self.size[0] % window or self.size[1] % window:
            raise ConfigError(
                f"encoder.image_size: stage 3 has {self.size[0]}x{self.size[1]} places, not whole "
                f"windows of {window}. Use e.g. 224"
            )
        if not 1 <= token_side <= window:
            raise ConfigError(
                f"method.token_side={token_side}: a window has {window}x{window} places, so 1 to "
                f"{window}"
            )
        windows = (self.size[0] // window) * (self.size[1] // window)
        self.num_tokens, self.window, self.token_side = windows * token_side**2, window, token_side
        self.blocks = nn.ModuleList(
            SemanticUnit(
                stage.blocks[i],  # type: ignore[arg-type]
                first.attn.num_heads,
                token_side,
                rates[i + 1 : i + UNIT],
                window_residual=window_residual,
            )
            for i in range(0, stage.depth, UNIT)
        )
        self.centres = None
        if start == "both":
            self.centres = nn.Parameter(torch.empty(1, self.num_tokens, first.dim))
            nn.init.trunc_normal_(self.centres, std=0.02)
        elif start != "pooling":
            raise ConfigError(f"method.start={start}: on Swin it may be pooling or both")

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for number, unit in enumerate(self.blocks):
            x = unit(x, None if number else self.centres)
        return x

    def token_counts(self) -> dict[str, list[int]]:
        """Of every layer."""
        places, tokens, window = self.size[0] * self.size[1], self.num_tokens, self.window
        local = self.token_side**2
        square = reach(self.size[0], window, MARGIN) * reach(self.size[1], window, MARGIN)
        keys = [window**2, local + square, tokens + places, local, tokens, tokens]
        units = len(self.blocks)
        return {"keys": keys * units, "mlp": [places, *[tokens] * 4, places] * units}


class SemanticSwin(SwinTransformer):
    """timm's Swin with a convolutional stem and the third stage on semantic tokens.

    token_side: side of the square of semantic tokens of each window. start: "pooling", or "both":
    learned global centres as well, added to the queries of the first unit. window_residual: False
    where what the windows' gathering gives takes the pooled tokens' place, as in the released runs.
    """

    def __init__(
        self,
        *,
        plain: str,
        token_side: int = 3,
        start: str = "pooling",
        window_residual: bool = True,
        **kwargs: Any,
    ) -> None:
        rate, depths = kwargs.get("drop_path_rate", 0.1), kwargs["depths"]
        super().__init__(embed_layer=ConvStem, **kwargs)
        self.plain = plain
        stage = self.layers[2]
        assert isinstance(stage, SwinTransformerStage)
        rates = calculate_drop_path_rates(rate, list(depths), stagewise=True)[2]
        assert isinstance(rates, list)
        self.layers[2] = SemanticStage(
            stage, token_side, start, rates, window_residual=window_residual
        )

    def set_input_size(self, *_: Any, **__: Any) -> None:
        raise ConfigError("STViT-R is created at its size: give img_size to create_model")

    def token_counts(self) -> dict[str, list[int]]:
        """Keys that each query attends to, and tokens that each layer gives on, by layer."""
        found: dict[str, list[int]] = {"keys": [], "mlp": []}
        for stage in self.layers:
            if isinstance(stage, SemanticStage):
                counts = stage.token_counts()
            else:
                assert isinstance(stage, SwinTransformerStage)
                rows, columns = stage.output_resolution
                window = stage.blocks[0].window_area
                counts = {"keys": [window] * stage.depth, "mlp": [rows * columns] * stage.depth}
            for where, values in counts.items():
                found[where] += values
        return found

    def gatherers(self, images: Tensor) -> Tensor:
        """(B, P): of every place of stage 3, the semantic token of the last unit whose attention
        on it is the highest."""
        stage = self.layers[2]
        assert isinstance(stage, SemanticStage)
        x = stage.downsample(self.layers[:2](self.patch_embed(images)))
        last = len(stage.blocks) - 1
        for number in range(last):
            x = stage.blocks[number](x, None if number else stage.centres)
        unit = stage.blocks[last]
        assert isinstance(unit, SemanticUnit)
        return unit.attention_map(x, None if last else stage.centres).argmax(1)


def _create(variant: str, pretrained: bool, **arguments: Any) -> SemanticSwin:
    out_indices = arguments.pop("out_indices", (0, 1, 2, 3))
    features = {"out_indices": out_indices, "flatten_sequential": True}
    return build_model_with_cfg(
        SemanticSwin, variant, pretrained, feature_cfg=features, **arguments
    )


_NAMES = ("stvit_r_swin_small", "stvit_r_swin_base")
default_cfgs = cfgs_of(
    _NAMES, fixed_input_size=True, first_conv="patch_embed.proj.0", classifier="head.fc"
)


@register_model
def stvit_r_swin_small(pretrained: bool = False, **kwargs: Any) -> SemanticSwin:
    sizes = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
    plain = {"plain": "swin_small_patch4_window7_224"}
    return _create("stvit_r_swin_small", pretrained, **(sizes | plain | kwargs))


@register_model
def stvit_r_swin_base(pretrained: bool = False, **kwargs: Any) -> SemanticSwin:
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    plain = {"plain": "swin_base_patch4_window7_224"}
    return _create("stvit_r_swin_base", pretrained, **(sizes | plain | kwargs))
