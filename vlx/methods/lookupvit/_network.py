"""LookupViT's network, by timm's conventions, registered with timm in four sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.helpers import to_2tuple
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models import register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from vlx.blocks.init import trunc_normal_init
from vlx.blocks.timm_model import TimmNetwork, build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.blocks.vit_block import Signal, attend
from vlx.core.errors import ConfigError
from vlx.ops.resample import resize_tokens


class WriteBack(nn.Module):
    """Values of the compressed tokens to the lookup tokens, by the gathering's own map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, compressed: Tensor, attention: Tensor) -> Tensor:
        """compressed: (B, M, D), normed; attention: (B, H, M, N), summing to 1 over N and left so:
        a lookup token receives M / N on average. Returns (B, N, D)."""
        heads = attention.shape[1]
        values = self.value(compressed).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, M, d)
        written = attention.transpose(-2, -1).to(values.dtype) @ values  # (B, H, N, d)
        return self.proj(written.transpose(1, 2).flatten(2))


class LookupBlock(nn.Module):
    """Gather, refine, write back, thin MLP. write_back: False leaves out the last two."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float,
        thin_ratio: float,
        drop_path: float,
        write_back: bool,
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.norm_query, self.norm_key = norm(dim), norm(dim)
        self.gather = Attention(dim, num_heads=heads, qkv_bias=True)
        self.refine = Block(
            dim,
            heads,
            mlp_ratio,
            qkv_bias=True,
            drop_path=drop_path,
            norm_layer=norm,  # type: ignore[arg-type]
        )
        self.drop_path = DropPath(drop_path)
        self.write_back = WriteBack(dim) if write_back else None
        if write_back:
            self.norm_write, self.norm_thin = norm(dim), norm(dim)
            self.thin_mlp = Mlp(dim, int(dim * thin_ratio))

    def attention_map(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        """What is gathered (B, M, D) and the map (B, H, M, N); averaging heads would break it."""
        gathered, signals = attend(
            self.gather, self.norm_query(compressed), context=self.norm_key(lookup),
            want=Signal.ATTN,
        )  # fmt: skip
        assert signals.attn is not None
        return gathered, signals.attn

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        """compressed: (B, M, D); lookup: (B, N, D). Returns both, updated."""
        if self.write_back is None:  # nobody asks for the map: the fused kernel
            queries, keys = self.norm_query(compressed), self.norm_key(lookup)
            gathered, _ = attend(self.gather, queries, context=keys)
            return self.refine(compressed + self.drop_path(gathered)), lookup
        gathered, attention = self.attention_map(compressed, lookup)
        compressed = self.refine(compressed + self.drop_path(gathered))
        written = self.write_back(self.norm_write(compressed), attention)
        lookup = lookup + self.drop_path(written)
        return compressed, lookup + self.drop_path(self.thin_mlp(self.norm_thin(lookup)))


class LookupVisionTransformer(TimmNetwork):
    """The backbone, by timm's conventions. No parameter depends on the compressed grid.

    compressed_grid: side of the square of compressed tokens. last_write_back: the last block
    writes to the lookup tokens too; nothing under a classifier then trains what it writes with.
    """

    pools = ("avg", "")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        plain: str,
        embed_dim: int,
        depth: int,
        num_heads: int,
        compressed_grid: int = 5,
        thin_ratio: float = 0.5,
        mlp_ratio: float = 4.0,
        last_write_back: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for extent in to_2tuple(img_size):
            if extent % patch_size:
                raise ConfigError(
                    f"encoder.image_size={extent} is not a multiple of the patch size {patch_size}"
                )
        self.plain, self.num_classes, self.global_pool = plain, num_classes, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 0
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            LookupBlock(
                embed_dim, num_heads, mlp_ratio=mlp_ratio, thin_ratio=thin_ratio,
                drop_path=rate, write_back=last_write_back or number < depth,
            )
            for number, rate in enumerate(rates, start=1)
        )  # fmt: skip
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size}
            for i in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self.make_head(num_classes)
        self.compressed_grid = self.check_grid(compressed_grid)
        self.init_weights()

    def init_weights(self) -> None:
        """DeiT's: truncated normal 0.02 on Linear and positions; the patch convolution as is."""
        trunc_normal_init(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        rows, columns = self.patch_embed.grid_size  # type: ignore[misc]
        return rows, columns

    def check_grid(self, side: int) -> int:
        """`side`; `ConfigError` where the image has not that many patches."""
        if not 1 <= side <= min(self.grid):
            rows, columns = self.grid
            raise ConfigError(
                f"method.grids: {side}x{side} compressed tokens of {rows}x{columns} patches; "
                f"a side may be 1 to {min(self.grid)}"
            )
        return side

    def embed(self, images: Tensor, side: int | None = None) -> tuple[Tensor, Tensor]:
        """Normalised images to (compressed (B, M, D), lookup (B, N, D)) before the first block."""
        lookup = self.patch_embed(images) + self.pos_embed
        return resize_tokens(lookup, self.grid, side or self.compressed_grid), lookup

    def forward_streams(
        self, images: Tensor, side: int | None = None, depth: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both streams after `depth` blocks (all of them), before the final norm."""
        compressed, lookup = self.embed(images, side)
        for block in self.blocks[:depth]:
            if self.grad_checkpointing and self.training:
                compressed, lookup = checkpoint(block, compressed, lookup, use_reentrant=False)
            else:
                compressed, lookup = block(compressed, lookup)
        return compressed, lookup

    def forward_features(self, x: Tensor, side: int | None = None) -> Tensor:
        """Normalised images to the compressed tokens (B, M, D), side: None as it was built."""
        return self.norm(self.forward_streams(x, side)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compressed tokens (B, M, D) to class logits (B, C)."""
        x = self.head_drop(x.mean(dim=1) if self.global_pool == "avg" else x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps (B, D, h, w) of the lookup stream after the blocks of `indices`."""
        assert output_fmt == "NCHW", "the lookup stream comes as maps: output_fmt='NCHW'"
        wanted, last = feature_take_indices(len(self.blocks), indices)
        compressed, lookup = self.embed(x)
        maps = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            compressed, lookup = block(compressed, lookup)
            if index in wanted:
                maps.append(self.as_maps(lookup, norm))
        return maps if intermediates_only else (self.norm(compressed), maps)

    def as_maps(self, lookup: Tensor, norm: bool = True) -> Tensor:
        """Lookup tokens (B, N, D) as (B, D, h, w), normalised without parameters."""
        lookup = layer_norm(lookup, lookup.shape[-1:]) if norm else lookup
        return lookup.transpose(1, 2).unflatten(2, self.grid)

    def make_head(self, num_classes: int) -> nn.Module:
        """As PyTorch's layers start: `init_weights` starts the one that the model is built with."""
        return nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups by depth."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^pos_embed|patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def token_counts(self) -> dict[str, list[int]]:
        depth, rows, columns = len(self.blocks), *self.grid
        return {"lookup": [rows * columns] * depth, "compressed": [self.compressed_grid**2] * depth}

    def gatherers(self, images: Tensor) -> Tensor:
        """(B, N): the compressed token whose attention on each lookup token is the highest."""
        compressed, lookup = self.forward_streams(images, depth=len(self.blocks) - 1)
        last = self.blocks[-1]
        assert isinstance(last, LookupBlock)
        return last.attention_map(compressed, lookup)[1].mean(1).argmax(1)


_NAMES = ("lookupvit_tiny", "lookupvit_small", "lookupvit_base", "lookupvit_large")
default_cfgs = cfgs_of(_NAMES, fixed_input_size=True, first_conv="patch_embed.proj")


def _create(variant: str, pretrained: bool, **arguments: Any) -> LookupVisionTransformer:
    return build_model(LookupVisionTransformer, variant, pretrained, features=3, **arguments)


@register_model
def lookupvit_tiny(pretrained: bool = False, **kwargs: Any) -> LookupVisionTransformer:
    sizes = {"embed_dim": 192, "depth": 12, "num_heads": 3, "plain": "deit_tiny_patch16_224"}
    return _create("lookupvit_tiny", pretrained, **(sizes | kwargs))


@register_model
def lookupvit_small(pretrained: bool = False, **kwargs: Any) -> LookupVisionTransformer:
    sizes = {"embed_dim": 384, "depth": 12, "num_heads": 6, "plain": "deit_small_patch16_224"}
    return _create("lookupvit_small", pretrained, **(sizes | kwargs))


@register_model
def lookupvit_base(pretrained: bool = False, **kwargs: Any) -> LookupVisionTransformer:
    sizes = {"embed_dim": 768, "depth": 12, "num_heads": 12, "plain": "deit_base_patch16_224"}
    return _create("lookupvit_base", pretrained, **(sizes | kwargs))


@register_model
def lookupvit_large(pretrained: bool = False, **kwargs: Any) -> LookupVisionTransformer:
    sizes = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "plain": "vit_large_patch16_224"}
    return _create("lookupvit_large", pretrained, **(sizes | kwargs))
