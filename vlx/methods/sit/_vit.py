"""A ViT with a token for each of two tasks in the place of the class token."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlx.blocks.init import trunc_normal_init
from vlx.blocks.timm_model import build_model
from vlx.blocks.timm_model import default_cfgs as cfgs_of


class TaskTokenVit(VisionTransformer):
    """timm's ViT with a class token, for rotation, and a register, for contrast, each with its row
    of the position table; the released code's initialisation."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(class_token=True, reg_tokens=1, weight_init="skip", **arguments)
        trunc_normal_init(self)
        for table in (self.pos_embed, self.cls_token, self.reg_token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)


MODELS = ("sit_tiny_patch16_224", "sit_small_patch16_224", "sit_base_patch16_224")
default_cfgs = cfgs_of(MODELS, first_conv="patch_embed.proj")


def _create(name: str, pretrained: bool, given: dict[str, Any], **sizes: Any) -> TaskTokenVit:
    return build_model(TaskTokenVit, name, pretrained, features=3, **{**sizes, **given})


@register_model
def sit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> TaskTokenVit:
    """ViT-Ti/16 with two task tokens."""
    sizes = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("sit_tiny_patch16_224", pretrained, kwargs, **sizes)


@register_model
def sit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> TaskTokenVit:
    """ViT-S/16 with two task tokens."""
    sizes = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("sit_small_patch16_224", pretrained, kwargs, **sizes)


@register_model
def sit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> TaskTokenVit:
    """ViT-B/16 with two task tokens: the first version's."""
    sizes = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("sit_base_patch16_224", pretrained, kwargs, **sizes)
