"""Any plain ViT of timm as a `VisionEncoder`, calling timm's own submodules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlx.blocks.vit_block import BlockHook, TokenReducer, check_blocks, run_blocks
from vlx.core.errors import ConfigError, one_line
from vlx.encoders.base import EncoderOut, EncoderSpec, VisionEncoder
from vlx.encoders.config import EncoderConfig, PosEmbed
from vlx.ops.patches import patchify
from vlx.ops.posembed import sincos_2d
from vlx.ops.token_state import start
from vlx.ops.tokens import gather_tokens


class TimmVit(VisionEncoder):
    """`vit` is timm's module; its parameter names are the official ones.

    num_classes: 0 leaves out the head and normalises every token; otherwise pooling, norms and
    head are the model's own, for `classify`.
    """

    def __init__(self, cfg: EncoderConfig, num_classes: int = 0) -> None:
        super().__init__()
        self.arguments = create_arguments(cfg, num_classes)
        """What makes timm build this model again, beside its name."""
        self.vit = _create(cfg, self.arguments)
        patch = self.vit.patch_embed.patch_size[0]
        self.spec = EncoderSpec(
            dim=self.vit.embed_dim,
            depth=len(self.vit.blocks),
            heads=_num_heads(self.vit.blocks[0]),
            patch_size=patch,
            image_size=cfg.image_size,
            num_prefix=self.vit.num_prefix_tokens,
            class_token=self.vit.cls_token is not None,
            mean=tuple(cfg.mean),
            std=tuple(cfg.std),
        )
        self.set_statistics(cfg.mean, cfg.std)
        if cfg.pos_embed is PosEmbed.sincos:
            prefix = 0 if self.vit.no_embed_class else self.spec.num_prefix
            table = sincos_2d(self.spec.grid, self.spec.dim, prefix)
            self.vit.pos_embed = nn.Parameter(table[None], requires_grad=False)

    @property
    def backbone(self) -> VisionTransformer:
        return self.vit

    @property
    def patch_conv(self) -> nn.Conv2d:
        return self.vit.patch_embed.proj  # type: ignore[return-value]

    @property
    def prefix_tokens(self) -> tuple[nn.Parameter, ...]:
        distillation = (
            self.vit.dist_token if isinstance(self.vit, VisionTransformerDistilled) else None
        )
        tokens = (self.vit.cls_token, distillation, self.vit.reg_token)
        return tuple(token for token in tokens if token is not None)

    def layer_depths(self) -> dict[str, int]:
        """The embedding is 0, block i (from 0) is i + 1; the final norm belongs to no layer."""
        stem = ("patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre")
        depths = {f"vit.{name}": 0 for name in stem}
        return depths | {f"vit.blocks.{i}": i + 1 for i in range(self.spec.depth)}

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalised images to block input (B, P + N or K, D); positions precede the dropping."""
        vit = self.vit
        if keep is None:
            x = vit.patch_embed(images).flatten(1, -2)  # (B, N, D)
        else:
            x = self._embed_kept(images, keep)  # (B, K, D)
        prefix = x.new_zeros(1, 0, x.shape[-1])
        for token in self.prefix_tokens:
            prefix = torch.cat([prefix, token], dim=1)
        if vit.pos_embed is not None:
            if vit.no_embed_class:
                positions = vit.pos_embed
            else:
                count = self.spec.num_prefix
                positions = vit.pos_embed[:, count:]
                prefix = prefix + vit.pos_embed[:, :count]
            if keep is not None:
                positions = gather_tokens(positions.expand(x.shape[0], -1, -1), keep)
            x = x + positions
        x = torch.cat([prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        return vit.norm_pre(vit.pos_drop(x))

    def _embed_kept(self, images: Tensor, keep: Tensor) -> Tensor:
        """The patch convolution on the patches `keep (B, K)` alone: it costs K/N of the whole."""
        conv = self.vit.patch_embed.proj
        patches = gather_tokens(patchify(images, self.spec.patch_size), keep)  # (B, K, p*p*3)
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # channel last, as patchify orders
        return self.vit.patch_embed.norm(nn.functional.linear(patches, weight, conv.bias))

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        layers: Sequence[int] = (),
        normalised: bool = False,
        hook: BlockHook | None = None,
    ) -> EncoderOut:
        x = self.embed(images if normalised else self.normalise(images), keep)
        if hook is not None:
            return self._hooked(x, hook, layers)
        taps: dict[int, Tensor] = {}
        recompute = self.vit.grad_checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.vit.blocks, start=1):
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if number in layers:
                taps[number] = x
        x = self.vit.norm(x)
        count = self.spec.num_prefix
        return EncoderOut(tokens=x[:, count:], prefix=x[:, :count], layers=taps)

    def _hooked(self, x: Tensor, hook: BlockHook, layers: Sequence[int]) -> EncoderOut:
        count = self.spec.num_prefix
        plan = None
        if isinstance(hook, TokenReducer):
            plan = hook.plan(x.shape[1] - count, count, self.spec.depth)
        state, taps = run_blocks(self.vit.blocks, start(x, count), hook, plan=plan, layers=layers)
        x = self.vit.norm(state.x)
        return EncoderOut(x[:, count:], x[:, :count], taps, state=replace(state, x=x))

    def check_hooks(self) -> None:
        check_blocks(self.vit.blocks, type(self.vit).__name__)

    def published(self, cfg: EncoderConfig) -> nn.Module:
        return timm.create_model(cfg.name, pretrained=True, **self.arguments)

    def classify(self, out: EncoderOut) -> Tensor:
        """timm's own pooling, norm and head; a mean over patches counts a merged token as many."""
        sizes = None if out.state is None else out.state.size
        if self.vit.global_pool != "avg" or sizes is None:
            return self.vit.forward_head(torch.cat([out.prefix, out.tokens], dim=1))
        weights = sizes[:, self.spec.num_prefix :]
        weights = weights / weights.sum(1, keepdim=True)
        pooled = (out.tokens * weights.unsqueeze(-1)).sum(1)
        return self.vit.head(self.vit.head_drop(self.vit.fc_norm(pooled)))


_PLAIN_MODULES = ("timm.models.vision_transformer", "timm.models.deit")


def is_plain_vit(name: str) -> bool:
    """Whether timm's model of that name is a plain ViT."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__ in _PLAIN_MODULES


def create_arguments(cfg: EncoderConfig, num_classes: int = 0) -> dict[str, Any]:
    """What `timm.create_model(cfg.name, ...)` needs to build this encoder's backbone.

    Raises `ConfigError` where the model does not take it.
    """
    sizes: dict[str, Any] = {
        "img_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "embed_dim": cfg.dim,
        "depth": cfg.depth,
        "num_heads": cfg.heads,
    }
    sizes = {key: value for key, value in sizes.items() if value is not None}
    if num_classes:
        return {"num_classes": num_classes, **sizes}
    with torch.device("meta"):  # its own pooling norms every token or leaves that to the head
        model = _timm_model(cfg.name, sizes)
    pool = "token" if model.cls_token is not None else ""
    return {"num_classes": 0, "global_pool": pool, **sizes}


def _timm_model(name: str, arguments: dict[str, Any], **more: Any) -> VisionTransformer:
    try:
        model = timm.create_model(name, **arguments, **more)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"encoder.name={name} does not take {arguments}: {one_line(error)}"
        ) from error
    if not isinstance(model, VisionTransformer) or model.patch_embed.grid_size is None:
        raise ConfigError(
            f"encoder.name={name} is a {type(model).__name__}, not a plain ViT. "
            "Use e.g. encoder.name=vit_small_patch16_224"
        )
    return model


def _create(cfg: EncoderConfig, arguments: dict[str, Any]) -> VisionTransformer:
    model = _timm_model(cfg.name, arguments, drop_path_rate=cfg.drop_path)
    side = model.patch_embed.patch_size[0]
    if cfg.image_size % side:
        raise ConfigError(
            f"encoder.image_size={cfg.image_size} is not a multiple of the patch size {side}"
        )
    return model


def _num_heads(block: nn.Module) -> int:
    """Of a block's attention, the first one where it has several."""
    counts = (getattr(part, "num_heads", None) for part in block.modules())
    return next(int(count) for count in counts if isinstance(count, int))
