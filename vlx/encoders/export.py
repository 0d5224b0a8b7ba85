"""Encoders as files that timm and transformers load, with the numbers that `vlx eval` measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vlx.core.errors import ConfigError
from vlx.core.files import write_json
from vlx.encoders.base import VisionEncoder
from vlx.encoders.config import EncoderConfig
from vlx.encoders.names import timm_names
from vlx.encoders.timm_vit import TimmVit

WEIGHTS = "model.safetensors"
_CHECKED = 4  # random images
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class EvaluatedView:
    """How `vlx eval` makes a square of a picture."""

    crop_ratio: float
    """Side of the central square by the short side, 0..1."""
    squeeze: bool = False
    """Resize the whole picture to a square instead."""
    interpolation: str = "bicubic"


def export_timm(
    encoder: VisionEncoder,
    cfg: EncoderConfig,
    out: Path,
    view: EvaluatedView,
    class_names: Sequence[str] = (),
) -> list[Path]:
    """Write `model.safetensors` and `config.json` in timm's own hub layout.

    `timm.create_model("local-dir:OUT", pretrained=True)` reads both. The model gives class logits
    where there are `class_names`, and else what `vlx eval` takes as the features of an image: the
    mean of the normed patch tokens. Raises `ConfigError` for a model that timm does not have.
    """
    name = cfg.name.split(".")[0]
    if name not in timm_names():
        raise ConfigError(f"timm has no {name}, which a method registers: its weights need vlx")
    model = encoder.backbone if class_names else _with_mean_pooling(encoder, name)
    side = encoder.spec.image_size
    data = {
        "input_size": (3, side, side),
        "mean": encoder.spec.mean,
        "std": encoder.spec.std,
        "interpolation": view.interpolation,
        "crop_pct": 1.0 if view.squeeze else view.crop_ratio,
        "crop_mode": "squash" if view.squeeze else "center",
    }
    labels = {"label_names": list(class_names)} if class_names else {}
    with _writing(out):
        save_for_hf(
            model,
            str(out),
            model_config=dict(labels),
            data_config=data,
            safe_serialization=True,
        )
    return [out / WEIGHTS, out / "config.json"]


def _with_mean_pooling(encoder: VisionEncoder, name: str) -> nn.Module:
    """timm's model whose output is the mean of the patch tokens; other models pool so already."""
    if not isinstance(encoder, TimmVit):
        return encoder.backbone
    pooled = {"num_classes": 0, "global_pool": "avg", "fc_norm": False}
    try:
        model = timm.create_model(name, **(encoder.arguments | pooled))
    except AssertionError as error:
        raise ConfigError(
            f"timm's {name} cannot pool its patch tokens, whose mean the features are"
        ) from error
    state = encoder.vit.state_dict()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    return model


def timm_output(out: Path) -> Callable[[Tensor], Tensor]:
    """What the written model makes of normalised images."""
    return timm.create_model(f"local-dir:{out}", pretrained=True).eval()


def probe(encoder: VisionEncoder) -> Tensor:
    """Random images in 0..1 on which an export is compared."""
    side = encoder.spec.image_size
    return torch.rand(_CHECKED, 3, side, side, generator=torch.Generator().manual_seed(0))


def check_alike(written: Tensor, measured: Tensor, kind: str) -> None:
    """Raise `ConfigError` unless the written model's output is what the run measures.

    Outputs (B, D) of the same images; kind: what the error calls the model.
    """
    scale = max(1.0, float(measured.abs().mean()))
    alike = written.shape == measured.shape
    if not alike or float((written - measured).abs().max()) > _TOLERANCE * scale:
        raise ConfigError(
            f"{kind} as the library runs it gives other numbers than the run: what the method adds "
            "(fewer tokens, another pooling) cannot go into the library's files"
        )


def export_hf(
    encoder: TimmVit, out: Path, view: EvaluatedView, class_names: Sequence[str] = ()
) -> list[Path]:
    """Write a directory that `transformers.ViTModel.from_pretrained` loads, or with `class_names`
    `ViTForImageClassification`.

    Raises `ConfigError` for a ViT with parts that transformers' ViT lacks. The pooler, which
    ViTModel has and a pre-trained encoder has not, is left out: pass add_pooling_layer=False. The
    features that `vlx eval` measures are the mean of the last hidden states of the patches.
    """
    vit, spec = encoder.vit, encoder.spec
    _refuse_what_vit_model_lacks(vit)
    if class_names and vit.global_pool != "token":
        raise ConfigError(
            f"transformers' ViT classifies by its class token, this one by {vit.global_pool}. "
            "Use --format timm"
        )
    config = {
        "architectures": ["ViTForImageClassification" if class_names else "ViTModel"],
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
    state = hf_state({k: v for k, v in vit.state_dict().items() if not k.startswith("head.")})
    if class_names:
        config["id2label"] = {str(number): name for number, name in enumerate(class_names)}
        config["label2id"] = {name: number for number, name in enumerate(class_names)}
        state = {f"vit.{key}": value for key, value in state.items()}
        state |= {f"classifier.{key}": value for key, value in vit.head.state_dict().items()}
    files = {"config.json": config, "preprocessor_config.json": image_processor(encoder, view)}
    return write_files(out, state, files)


def image_processor(encoder: VisionEncoder, view: EvaluatedView) -> dict[str, Any]:
    """transformers' CLIPImageProcessor, which crops as `vlx eval` does or squeezes."""
    spec = encoder.spec
    square = {"height": spec.image_size, "width": spec.image_size}
    short = round(spec.image_size / view.crop_ratio)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if view.squeeze else {"shortest_edge": short},
        "resample": {"bilinear": 2, "bicubic": 3}[view.interpolation],
        "do_center_crop": not view.squeeze,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def hf_output(out: Path, classifier: bool) -> Callable[[Tensor], Tensor]:
    """Class logits of normalised images, or the mean of the patches' last hidden states."""
    from transformers import ViTForImageClassification, ViTModel

    if classifier:
        logits = ViTForImageClassification.from_pretrained(out).eval()
        return lambda pixels: logits(pixels).logits
    model = ViTModel.from_pretrained(out, add_pooling_layer=False).eval()
    return lambda pixels: model(pixels).last_hidden_state[:, 1:].mean(1)


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
    if not isinstance(block, Block):
        raise ConfigError(
            f"transformers' ViTModel has no {type(block).__name__}. Use --format timm"
        )
    lacking = {
        "no class token": vit.cls_token is None,
        "register tokens": vit.reg_token is not None,
        "no position for the class token": vit.no_embed_class,
        "a norm before the blocks": not isinstance(vit.norm_pre, nn.Identity),
        "no final norm": isinstance(vit.norm, nn.Identity),
        "a norm after pooling": not isinstance(vit.fc_norm, nn.Identity),
        "layer scale": not isinstance(block.ls1, nn.Identity),
        "normalised queries": not isinstance(block.attn.q_norm, nn.Identity),  # type: ignore[union-attr]
        "a distillation token": vit.num_prefix_tokens > 1 and vit.reg_token is None,
        "an activation other than GELU": not isinstance(block.mlp.act, nn.GELU),  # type: ignore[union-attr]
    }
    found = [what for what, present in lacking.items() if present]
    if found:
        raise ConfigError(
            f"transformers' ViTModel cannot hold this encoder, which has {', '.join(found)}. "
            "Use --format timm"
        )


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Make OUT; raises `ConfigError` where it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror or error}") from error


def write_files(out: Path, state: Mapping[str, Tensor], files: Mapping[str, Any]) -> list[Path]:
    """Weights first, descriptions after them; raises `ConfigError` where OUT cannot be written."""
    with _writing(out):
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
        save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
        for name, content in files.items():
            write_json(out / name, json.loads(json.dumps(content)))
    return [out / WEIGHTS, *(out / name for name in files)]
