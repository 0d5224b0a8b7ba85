"""Weight initialisation schemes that papers name."""

from __future__ import annotations

from torch import nn


def xavier_init(module: nn.Module) -> None:
    """MAE's scheme: Linear Xavier-uniform with zero bias, LayerNorm 1 and 0; in place."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def xavier_normal_init(module: nn.Module) -> None:
    """Linear and convolution Xavier-normal with zero bias, LayerNorm 1 and 0; in place."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(part.weight.data.view(len(part.weight), -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def trunc_normal_init(module: nn.Module) -> None:
    """BEiT's and DINO's scheme: Linear truncated normal 0.02, zero bias, LayerNorm 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def normal_init(module: nn.Module, std: float = 0.02) -> None:
    """BERT's scheme: Linear and Embedding normal 0.02, zero bias, LayerNorm 1 and 0; in place."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def xavier_init_patch_embed(conv: nn.Conv2d) -> None:
    """Xavier-uniform on the patch convolution seen as a (D, C*p*p) matrix; bias untouched."""
    nn.init.xavier_uniform_(conv.weight.data.view(conv.out_channels, -1))
