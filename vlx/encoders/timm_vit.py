"""Any plain ViT of timm as a `VisionEncoder`, calling timm's own submodules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlx.core.errors import ConfigError, nearest
from vlx.encoders.base import EncoderOut, EncoderSpec, VisionEncoder
from vlx.encoders.config import EncoderConfig, PosEmbed
from vlx.ops.posembed import sincos_2d
from vlx.ops.tokens import gather_tokens


class TimmVit(VisionEncoder):
    """`vit` is timm's module, without its head; its parameter names are the official ones."""

    def __init__(self, cfg: EncoderConfig) -> None:
        super().__init__()
        self.vit = _create(cfg)
        patch = self.vit.patch_embed.patch_size[0]
        first = self.vit.blocks[0].attn
        self.spec = EncoderSpec(
            dim=self.vit.embed_dim,
            depth=len(self.vit.blocks),
            heads=int(first.num_heads),  # type: ignore[union-attr, arg-type]
            patch_size=patch,
            image_size=cfg.image_size,
            num_prefix=self.vit.num_prefix_tokens,
            mean=tuple(cfg.mean),
            std=tuple(cfg.std),
        )
        self.set_statistics(cfg.mean, cfg.std)
        if cfg.pos_embed is PosEmbed.sincos:
            prefix = 0 if self.vit.no_embed_class else self.spec.num_prefix
            table = sincos_2d(self.spec.grid, self.spec.dim, prefix)
            self.vit.pos_embed = nn.Parameter(table[None], requires_grad=False)

    def layer_depths(self) -> dict[str, int]:
        """The embedding is 0, block i (from 0) is i + 1; the final norm belongs to no layer."""
        stem = ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre")
        depths = {f"vit.{name}": 0 for name in stem}
        return depths | {f"vit.blocks.{i}": i + 1 for i in range(self.spec.depth)}

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalised images to block input (B, P + N or K, D); positions precede the dropping."""
        vit = self.vit
        x = vit.patch_embed(images).flatten(1, -2)  # (B, N, D)
        prefix = x.new_zeros(1, 0, x.shape[-1])
        for token in (vit.cls_token, vit.reg_token):
            if token is not None:
                prefix = torch.cat([prefix, token], dim=1)
        if vit.pos_embed is not None:
            if vit.no_embed_class:
                x = x + vit.pos_embed
            else:
                count = self.spec.num_prefix
                x = x + vit.pos_embed[:, count:]
                prefix = prefix + vit.pos_embed[:, :count]
        if keep is not None:
            x = gather_tokens(x, keep)
        x = torch.cat([prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        return vit.norm_pre(vit.pos_drop(x))

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        layers: Sequence[int] = (),
        normalised: bool = False,
    ) -> EncoderOut:
        x = self.embed(images if normalised else self.normalise(images), keep)
        taps: dict[int, Tensor] = {}
        for number, block in enumerate(self.vit.blocks, start=1):
            x = block(x)
            if number in layers:
                taps[number] = x
        x = self.vit.norm(x)
        count = self.spec.num_prefix
        return EncoderOut(tokens=x[:, count:], prefix=x[:, :count], layers=taps)


def _create(cfg: EncoderConfig) -> VisionTransformer:
    if not timm.is_model(cfg.name):
        known = timm.list_models("*vit*")
        raise ConfigError(f"encoder.name: no timm model '{cfg.name}'. {nearest(cfg.name, known)}")
    sizes: dict[str, Any] = {
        "img_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "embed_dim": cfg.dim,
        "depth": cfg.depth,
        "num_heads": cfg.heads,
    }
    sizes = {key: value for key, value in sizes.items() if value is not None}
    try:
        model = timm.create_model(
            cfg.name, num_classes=0, drop_path_rate=cfg.drop_path, global_pool="token", **sizes
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"encoder.name={cfg.name} does not take {sizes}: {error}") from error
    if not isinstance(model, VisionTransformer) or model.patch_embed.grid_size is None:
        raise ConfigError(
            f"encoder.name={cfg.name} is a {type(model).__name__}, not a plain ViT. "
            "Use e.g. encoder.name=vit_small_patch16_224"
        )
    side = model.patch_embed.patch_size[0]
    if cfg.image_size % side:
        raise ConfigError(
            f"encoder.image_size={cfg.image_size} is not a multiple of the patch size {side}"
        )
    return model
