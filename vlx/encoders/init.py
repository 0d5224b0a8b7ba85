"""Initialisation of whole encoders, as papers describe it."""

from __future__ import annotations

from timm.layers.attention import Attention
from torch import nn

from vlx.blocks.init import trunc_normal_init, xavier_init, xavier_init_patch_embed
from vlx.encoders.base import VisionEncoder
from vlx.encoders.timm_vit import TimmVit


def mae_init(encoder: VisionEncoder) -> None:
    """MAE's: Xavier everywhere, the patch convolution as a matrix, class token N(0, 0.02)."""
    xavier_init(encoder)
    xavier_init_patch_embed(encoder.patch_conv)
    for token in encoder.prefix_tokens:
        nn.init.normal_(token, std=0.02)


def trunc_normal_vit_init(encoder: VisionEncoder) -> None:
    """Truncated normal 0.02 on Linear, class token and position table; convolution untouched."""
    trunc_normal_init(encoder)
    for token in encoder.prefix_tokens:
        nn.init.trunc_normal_(token, std=0.02)
    if isinstance(encoder, TimmVit) and encoder.vit.pos_embed is not None:
        nn.init.trunc_normal_(encoder.vit.pos_embed, std=0.02)


def clip_vision_init(encoder: VisionEncoder) -> None:
    """CLIP's: class token, positions and projection N(0, 1/width), attention as PyTorch's own
    multi-head attention starts, all else as PyTorch's layers do. Of a plain ViT; others keep what
    their library gives them."""
    if not isinstance(encoder, TimmVit):
        return
    vit, std = encoder.vit, encoder.spec.dim**-0.5
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
            module.reset_parameters()
    for module in vit.blocks.modules():
        if not isinstance(module, Attention):
            continue
        nn.init.xavier_uniform_(module.qkv.weight)
        for layer in (module.qkv, module.proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for token in encoder.prefix_tokens:
        nn.init.normal_(token, std=std)
    if vit.pos_embed is not None and vit.pos_embed.requires_grad:
        nn.init.normal_(vit.pos_embed, std=std)
    if isinstance(vit.head, nn.Linear):
        nn.init.normal_(vit.head.weight, std=std)
