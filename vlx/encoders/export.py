"""Encoders as files that timm and transformers load, without either library's help to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlx.core.errors import ConfigError
from vlx.core.files import write_json
from vlx.encoders.config import EncoderConfig
from vlx.encoders.timm_vit import TimmVit, create_arguments

WEIGHTS = "model.safetensors"


def export_timm(encoder: TimmVit, cfg: EncoderConfig, out: Path) -> list[Path]:
    """Write `model.safetensors` and `config.json` in timm's own hub layout.

    `timm.create_model(config["architecture"], **config["model_args"])` takes the weights strictly,
    and `timm.create_model("local-dir:OUT", pretrained=True)` reads both files.
    """
    arguments = create_arguments(cfg)
    side = encoder.spec.image_size
    config = {
        "architecture": cfg.name.split(".")[0],
        "num_classes": 0,
        "num_features": encoder.spec.dim,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "mean": list(encoder.spec.mean),
            "std": list(encoder.spec.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return _write(out, encoder.vit.state_dict(), {"config.json": config})


def export_hf(encoder: TimmVit, out: Path) -> list[Path]:
    """Write a directory that `transformers.ViTModel.from_pretrained` loads.

    Raises `ConfigError` for a ViT with parts that transformers' ViT lacks. The pooler, which
    ViTModel has and a pre-trained encoder has not, is left out: pass add_pooling_layer=False.
    """
    vit, spec = encoder.vit, encoder.spec
    _refuse_what_vit_model_lacks(vit)
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "intermediate_size": vit.state_dict()["blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": vit.norm.eps,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "dtype": "float32",
    }
    side = {"height": spec.image_size, "width": spec.image_size}
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    files = {"config.json": config, "preprocessor_config.json": processor}
    return _write(out, hf_state(vit.state_dict()), files)


def hf_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of a plain ViT as those of transformers' files on the hub; qkv is split."""
    fixed = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    in_block = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in fixed:
            found[fixed[name]] = value
            continue
        part, kind = name.rsplit(".", 1)
        if part in fixed:
            found[f"{fixed[part]}.{kind}"] = value
            continue
        _, number, inner = part.split(".", 2)
        layer = f"encoder.layer.{number}"
        if inner == "attn.qkv":
            for role, rows in zip(("query", "key", "value"), value.chunk(3)):
                found[f"{layer}.attention.attention.{role}.{kind}"] = rows
        else:
            found[f"{layer}.{in_block[inner]}.{kind}"] = value
    return found


def _refuse_what_vit_model_lacks(vit: VisionTransformer) -> None:
    block = vit.blocks[0]
    lacking = {
        "no class token": vit.cls_token is None,
        "register tokens": vit.reg_token is not None,
        "no position for the class token": vit.no_embed_class,
        "a norm before the blocks": not isinstance(vit.norm_pre, nn.Identity),
        "layer scale": not isinstance(block.ls1, nn.Identity),
        "normalised queries": not isinstance(block.attn.q_norm, nn.Identity),  # type: ignore[union-attr]
        "an activation other than GELU": not isinstance(block.mlp.act, nn.GELU),  # type: ignore[union-attr]
    }
    found = [what for what, present in lacking.items() if present]
    if found:
        raise ConfigError(
            f"transformers' ViTModel cannot hold this encoder, which has {', '.join(found)}. "
            "Use --format timm"
        )


def _write(out: Path, state: dict[str, Tensor], files: dict[str, Any]) -> list[Path]:
    """Weights first, descriptions after them; raises `ConfigError` where OUT cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
        save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
        for name, content in files.items():
            write_json(out / name, json.loads(json.dumps(content)))
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from error
    return [out / WEIGHTS, *(out / name for name in files)]
