"""LoRA and IA3 inside an encoder, by peft: its linear layers are replaced in place."""

from __future__ import annotations

from torch import nn

from vlx.core.errors import ConfigError
from vlx.encoders.base import VisionEncoder

_ATTENTION, _MLP = ("attn.qkv", "attn.proj"), ("mlp.fc1", "mlp.fc2")
MARKS = ("lora_", "ia3_")
"""What the names of inserted parameters hold."""


def insert_lora(encoder: VisionEncoder, rank: int, alpha: float, dropout: float) -> None:
    """LoRA (Hu et al., ICLR 2022) beside the attention's projections: W + alpha/rank * B A.

    B starts at zero, so the encoder is unchanged at first. Freezes all else of the encoder.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ConfigError(f"method.rank={rank} must be at least 1")
    names = _linears(encoder.backbone, _ATTENTION)
    _insert(
        encoder,
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names),  # type: ignore[arg-type]
    )


def insert_ia3(encoder: VisionEncoder) -> None:
    """IA3 (Liu et al., NeurIPS 2022): learned scales, 1 at first, on what attention projects and
    on the input of the MLP's second layer. Freezes all else of the encoder.

    timm projects queries, keys and values together, so that queries are scaled here too.
    """
    from peft import IA3Config

    names = _linears(encoder.backbone, ("attn.qkv", "mlp.fc2"))
    second = [name for name in names if name.endswith("mlp.fc2")]
    _insert(encoder, IA3Config(target_modules=names, feedforward_modules=second))


def _linears(backbone: nn.Module, endings: tuple[str, ...]) -> list[str]:
    """Names of the linear layers of every block."""
    found = [
        name
        for name, part in backbone.named_modules()
        if name.endswith(endings) and isinstance(part, nn.Linear)
    ]
    if not found:
        raise ConfigError(
            f"{type(backbone).__name__} has no {' or '.join(endings)} to adapt: use a ViT of timm"
        )
    return found


def _insert(encoder: VisionEncoder, config) -> None:
    from peft import inject_adapter_in_model

    encoder.requires_grad_(False)
    inject_adapter_in_model(config, encoder.backbone)
    for name, param in encoder.named_parameters():
        param.requires_grad_(any(mark in name for mark in MARKS))


def merge_adapters(encoder: VisionEncoder) -> None:
    """Put what was inserted into the weights beside which it stands, and take it out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, part in list(encoder.named_modules()):
        if isinstance(part, BaseTunerLayer):
            part.merge()
            parent, _, child = name.rpartition(".")
            setattr(encoder.get_submodule(parent), child, part.get_base_layer())
