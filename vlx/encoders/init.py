"""Initialisation of whole encoders, as papers describe it."""

from __future__ import annotations

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
