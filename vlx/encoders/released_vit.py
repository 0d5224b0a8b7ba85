"""ViTs that were released under torchvision's names (its own, SWAG's) for timm's plain ViT."""

from __future__ import annotations

from torch import Tensor

from vlx.core.released import Renames, renamed

_NAMES: Renames = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.(?:encoder_)?layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.|^head\.layers\.head\.", "head."),
    (r"^(blocks\.\d+)\.ln_(\d)\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.self_attention\.in_proj_", r"\1.attn.qkv."),
    (r"^(blocks\.\d+)\.self_attention\.out_proj\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.mlp\.(?:linear_1|0)\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.mlp\.(?:linear_2|3)\.", r"\1.mlp.fc2."),
)


def vit_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state by timm's names; one that has them already stays as it is."""
    if "class_token" not in state:
        return state
    found = renamed(state, _NAMES)
    table = found.get("pos_embed")
    if table is not None and table.ndim == 3 and table.shape[1] == 1:  # SWAG: places first
        found["pos_embed"] = table.transpose(0, 1)
    return found
