"""STViT on DeiT: a few semantic tokens replace all patches after the first layers."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.blocks.vit_block import Signal, attend, cross_block
from vlx.core.errors import ConfigError
from vlx.methods.stvit._pooling import max_pool_grid

STARTS = ("both", "pooling", "centres")


class SemanticVisionTransformer(VisionTransformer):
    """timm's ViT without a class token; layers `base_layers` and on gather instead of attending.

    token_side: side of the square of semantic tokens. start: what they start from: "pooling" the
    pooled map; "centres" learned global centres; "both" the pooled map, the centres added to the
    queries of the second layer that gathers. The tokens are averaged under the head.
    """

    def __init__(
        self,
        *,
        plain: str,
        base_layers: int = 4,
        gather_layers: int = 2,
        token_side: int = 4,
        start: str = "both",
        **kwargs: Any,
    ) -> None:
        kwargs = {"class_token": False, "global_pool": "avg", "fc_norm": False} | kwargs
        super().__init__(**kwargs)
        depth = len(self.blocks)
        side = min(self.grid)
        least = 2 if start == "both" else 1
        if not (base_layers >= 0 and least <= gather_layers <= depth - base_layers):
            raise ConfigError(
                f"method.base_layers={base_layers} and method.gather_layers={gather_layers} do not "
                f"fit: at least {least} of the encoder's {depth} layers gather, after the base"
            )
        if not 1 <= token_side <= side:
            raise ConfigError(
                f"method.token_side={token_side}: the encoder has {side}x{side} patches, so 1 to "
                f"{side}"
            )
        if start not in STARTS:
            raise ConfigError(f"method.start={start} must be among {', '.join(STARTS)}")
        self.plain, self.start = plain, start
        self.base_layers, self.gather_layers = base_layers, gather_layers
        self.token_side = token_side
        self.feature_info = self.feature_info[:base_layers]  # the grid ends there
        self.centres = None
        if start != "pooling":
            self.centres = nn.Parameter(torch.empty(1, token_side**2, self.embed_dim))
            nn.init.normal_(self.centres, std=0.02)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        rows, columns = self.patch_embed.grid_size  # type: ignore[misc]
        return rows, columns

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images to the patches (B, N, D) before the first layer."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))

    def start_tokens(self, patches: Tensor) -> Tensor:
        """The semantic tokens (B, M, D) before they gather. patches: (B, N, D)."""
        if self.start == "centres":
            assert self.centres is not None
            return self.centres.expand(len(patches), -1, -1)
        pooled = max_pool_grid(patches.unflatten(1, self.grid), self.token_side)
        return pooled.flatten(1, 2)

    def queries(self, tokens: Tensor, number: int) -> Tensor:
        """What the gathering layer of a number, 0 = first, starts from."""
        if number == 1 and self.start == "both":
            assert self.centres is not None
            return tokens + self.centres
        return tokens

    def gather(self, patches: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        """Semantic tokens after so many gathering layers, and the keys of the next (B, M + N, D).

        The patches (B, N, D) are not updated; from the second layer on the semantic tokens stand
        in front of them among the keys.
        """
        tokens, keys = self.start_tokens(patches), patches
        for number in range(layers):
            block = self.blocks[self.base_layers + number]
            tokens = cross_block(block, self.queries(tokens, number), keys)  # type: ignore[arg-type]
            keys = torch.cat([tokens, patches], dim=1)
        return tokens, keys

    def base(self, images: Tensor) -> Tensor:
        """Normalised images to the patches (B, N, D) after the base layers."""
        x = self.embed(images)
        for index in range(self.base_layers):
            x = self.blocks[index](x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images to the semantic tokens (B, M, D) after the final norm."""
        x, _ = self.gather(self.base(x), self.gather_layers)
        for index in range(self.base_layers + self.gather_layers, len(self.blocks)):
            x = self.blocks[index](x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after the base layers of `indices`, the only layers that have the grid."""
        wanted, _ = feature_take_indices(self.base_layers, indices)
        patches, maps = self.embed(x), []
        for index in range(min(self.base_layers, len(self.blocks))):  # fewer when pruned
            patches = self.blocks[index](patches)
            if index in wanted:
                tokens = self.norm(patches) if norm else patches
                maps.append(tokens.transpose(1, 2).unflatten(2, self.grid))
        maps = maps if output_fmt == "NCHW" else [m.flatten(2).transpose(1, 2) for m in maps]
        return maps if intermediates_only else (self.forward_features(x), maps)

    def prune_intermediate_layers(self, indices: Any = 1, *args: Any, **kwargs: Any) -> list[int]:
        """Drop what `forward_intermediates` does not need. Returns the indices, not negative."""
        self.blocks = self.blocks[: self.base_layers]
        return super().prune_intermediate_layers(indices, *args, **kwargs)

    def set_input_size(self, *_: Any, **__: Any) -> None:
        raise ConfigError("a semantic ViT is created at its size: give img_size to create_model")

    def token_counts(self) -> dict[str, list[int]]:
        """Keys that each query attends to, and tokens that each layer gives on, by layer."""
        patches, tokens = self.grid[0] * self.grid[1], self.token_side**2
        rest = len(self.blocks) - self.base_layers - self.gather_layers
        keys = [patches] * (self.base_layers + 1)
        keys += [patches + tokens] * (self.gather_layers - 1) + [tokens] * rest
        left = [patches] * self.base_layers + [tokens] * (self.gather_layers + rest)
        return {"keys": keys, "mlp": left}

    def gatherers(self, images: Tensor) -> Tensor:
        """(B, N): the semantic token whose attention on each patch is the highest."""
        patches = self.base(images)
        number = self.gather_layers - 1
        tokens, keys = self.gather(patches, number)
        block: Block = self.blocks[self.base_layers + number]  # type: ignore[assignment]
        _, signals = attend(
            block.attn,  # type: ignore[arg-type]
            block.norm1(self.queries(tokens, number)),
            context=block.norm1(keys),
            want=Signal.ATTN,
        )
        assert signals.attn is not None
        return signals.attn.mean(1)[..., -patches.shape[1] :].argmax(1)


_NAMES = ("stvit_deit_tiny", "stvit_deit_small", "stvit_deit_base")
default_cfgs = cfgs_of(_NAMES, fixed_input_size=True, first_conv="patch_embed.proj")


def _create(variant: str, pretrained: bool, **arguments: Any) -> SemanticVisionTransformer:
    return build_model(SemanticVisionTransformer, variant, pretrained, features=3, **arguments)


@register_model
def stvit_deit_tiny(pretrained: bool = False, **kwargs: Any) -> SemanticVisionTransformer:
    sizes = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    plain = {"plain": "deit_tiny_patch16_224"}
    return _create("stvit_deit_tiny", pretrained, **(sizes | plain | kwargs))


@register_model
def stvit_deit_small(pretrained: bool = False, **kwargs: Any) -> SemanticVisionTransformer:
    sizes = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    plain = {"plain": "deit_small_patch16_224"}
    return _create("stvit_deit_small", pretrained, **(sizes | plain | kwargs))


@register_model
def stvit_deit_base(pretrained: bool = False, **kwargs: Any) -> SemanticVisionTransformer:
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    plain = {"plain": "deit_base_patch16_224"}
    return _create("stvit_deit_base", pretrained, **(sizes | plain | kwargs))
