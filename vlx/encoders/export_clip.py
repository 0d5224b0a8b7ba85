"""A whole CLIP for transformers: both towers, their projections, the temperature, the tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from timm.layers.activations import QuickGELU
from tokenizers import AddedToken, Regex, normalizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn

from vlx.core.errors import ConfigError
from vlx.core.text import Tokenizer
from vlx.encoders.base import VisionEncoder
from vlx.encoders.clip_text import ClipText
from vlx.encoders.export import EvaluatedView, image_processor, write_files
from vlx.encoders.timm_vit import TimmVit
from vlx.encoders.tokenizers import BpeTokenizer

_INSIDE = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SPECIAL = ("pad", "bos", "eos")


@runtime_checkable
class ClipTowers(Protocol):
    """Two towers and their projections: the image tower's is its head."""

    image: VisionEncoder
    text: nn.Module
    projection: nn.Linear
    tokenizer: Tokenizer


def export_clip(
    towers: ClipTowers, logit_scale: float, out: Path, view: EvaluatedView
) -> list[Path]:
    """Write a directory that `transformers.CLIPModel` and `AutoProcessor` load.

    transformers has no ftfy and resolves no HTML entities: such captions are to be cleaned before.
    Raises `ConfigError` for towers that are not CLIP's.
    """
    image, text = towers.image, towers.text
    if not isinstance(image, TimmVit) or not isinstance(text, ClipText) or not text.causal:
        kinds = f"{type(image).__name__} and {type(text).__name__}"
        raise ConfigError(f"transformers' CLIPModel holds CLIP's ViT and text tower, not {kinds}")
    _refuse_what_clip_lacks(image)
    if not isinstance(towers.tokenizer, BpeTokenizer):
        raise ConfigError(f"{towers.tokenizer.name} is no BPE: CLIPModel's texts are read by one")
    order, special, backend = _hf_tokenizer(towers.tokenizer, text.spec.vocab_size)
    state = _image_state(image) | _text_state(text, order)
    state["text_projection.weight"] = towers.projection.weight
    state["logit_scale"] = torch.tensor(math.log(logit_scale))
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": towers.projection.out_features,
        "logit_scale_init_value": math.log(logit_scale),
        "vision_config": _vision_config(image),
        "text_config": _text_config(text, special),
        "dtype": "float32",
    }
    length = towers.tokenizer.context_length
    files = {
        "config.json": config,
        "preprocessor_config.json": image_processor(image, view)
        | {"processor_class": "CLIPProcessor"},
        "tokenizer.json": json.loads(backend.to_str()),
        "tokenizer_config.json": _tokenizer_config(backend, special, length),
    }
    return write_files(out, state, files)


def _refuse_what_clip_lacks(image: TimmVit) -> None:
    vit = image.vit
    lacking = {
        "no class token": vit.cls_token is None,
        "register tokens": vit.num_prefix_tokens > 1,
        "no norm before the blocks": isinstance(vit.norm_pre, nn.Identity),
        "a bias in its patch embedding": image.patch_conv.bias is not None,
        "layer scale": any("ls1" in name for name in vit.state_dict()),
        f"pooling by {vit.global_pool}": vit.global_pool != "token",
        "no projection": not isinstance(vit.head, nn.Linear) or vit.head.bias is not None,
    }
    found = [what for what, present in lacking.items() if present]
    if found:
        raise ConfigError(
            f"transformers' CLIPModel cannot hold this image tower, which has {', '.join(found)}: "
            "encoder=clip_vit_b16 is of CLIP's kind"
        )


def _vision_config(image: TimmVit) -> dict[str, Any]:
    spec = image.spec
    return {
        "model_type": "clip_vision_model",
        "hidden_size": spec.dim,
        "intermediate_size": image.vit.state_dict()["blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "hidden_act": _activation(image.vit),
        "layer_norm_eps": image.vit.norm.eps,
        "projection_dim": image.vit.num_classes,
    }


def _text_config(text: ClipText, special: dict[str, int]) -> dict[str, Any]:
    spec = text.spec
    return {
        "model_type": "clip_text_model",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.dim,
        "intermediate_size": text.state_dict()["blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.context_length,
        "hidden_act": _activation(text),
        "layer_norm_eps": text.norm.eps,
        **{f"{name}_token_id": number for name, number in special.items()},
    }


def _activation(tower: nn.Module) -> str:
    quick = any(isinstance(part, QuickGELU) for part in tower.modules())
    if not quick and not any(isinstance(part, nn.GELU) for part in tower.modules()):
        raise ConfigError("transformers' CLIPModel computes GELU or QuickGELU, this tower neither")
    return "quick_gelu" if quick else "gelu"


def _image_state(image: TimmVit) -> dict[str, Tensor]:
    state, tower = image.vit.state_dict(), "vision_model"
    named = {
        f"{tower}.embeddings.class_embedding": state["cls_token"].flatten(),
        f"{tower}.embeddings.position_embedding.weight": state["pos_embed"][0],
        f"{tower}.embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "visual_projection.weight": state["head.weight"],
    }
    for kind in ("weight", "bias"):
        named[f"{tower}.pre_layrnorm.{kind}"] = state[f"norm_pre.{kind}"]
        named[f"{tower}.post_layernorm.{kind}"] = state[f"norm.{kind}"]
    return named | _blocks(state, tower)


def _text_state(text: ClipText, order: Tensor) -> dict[str, Tensor]:
    state, tower = text.state_dict(), "text_model"
    named = {
        f"{tower}.embeddings.token_embedding.weight": state["tokens.weight"][order],
        f"{tower}.embeddings.position_embedding.weight": state["positions"],
    }
    for kind in ("weight", "bias"):
        named[f"{tower}.final_layer_norm.{kind}"] = state[f"norm.{kind}"]
    return named | _blocks(state, tower)


def _blocks(state: dict[str, Tensor], tower: str) -> dict[str, Tensor]:
    named = {}
    for name, value in state.items():
        if not name.startswith("blocks."):
            continue
        _, number, rest = name.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        layer = f"{tower}.encoder.layers.{number}"
        if part == "attn.qkv":
            for role, rows in zip("qkv", value.chunk(3)):
                named[f"{layer}.self_attn.{role}_proj.{kind}"] = rows
        else:
            named[f"{layer}.{_INSIDE[part]}.{kind}"] = value
    return named


def _hf_tokenizer(tokenizer: BpeTokenizer, rows: int) -> tuple[Tensor, dict[str, int], Backend]:
    """(row of our table for each of theirs, ids of the special tokens, the tokenizer of the file).

    transformers takes an end token of id 2 for one of an old kind and looks for the highest id
    instead: ours then changes places with the last id of the vocabulary.
    """
    content = json.loads(tokenizer.backend.to_str())
    order = torch.arange(rows)
    special = {"pad": tokenizer.pad_id, "bos": tokenizer.start_id, "eos": tokenizer.end_id}
    if special["eos"] == 2:
        last = tokenizer.backend.get_vocab_size() - 1
        swapped = {2: last, last: 2}
        order[2], order[last] = last, 2
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {k: swapped.get(v, v) for k, v in vocabulary.items()}
        for token in content["added_tokens"]:
            token["id"] = swapped.get(token["id"], token["id"])
        content["added_tokens"].sort(key=lambda token: token["id"])
        special = {name: swapped.get(number, number) for name, number in special.items()}
    backend = Backend.from_str(json.dumps(content))
    words = {name: _word(backend, number) for name, number in special.items()}
    # CLIP's own vocabulary has "!" at 0, with which it pads: padding is behind the end token.
    names = [words["bos"], words["eos"]]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    cleaning = [
        normalizers.NFC(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
        normalizers.Lowercase(),
    ]
    backend.normalizer = normalizers.Sequence(cleaning)  # type: ignore[assignment]
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{words['bos']} $A {words['eos']}",
        special_tokens=[(words[name], special[name]) for name in ("bos", "eos")],
    )
    return order, special, backend


def _word(backend: Backend, number: int) -> str:
    word = backend.id_to_token(number)
    if word is None:
        raise ConfigError(f"the tokenizer has no token of id {number}")
    return word


def _tokenizer_config(backend: Backend, special: dict[str, int], length: int) -> dict[str, Any]:
    tokens = {f"{name}_token": _word(backend, special[name]) for name in _SPECIAL}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "padding_side": "right",
        **tokens,
    }


def clip_outputs(out: Path, texts: list[str], pixels: Tensor) -> tuple[Tensor, Tensor, float]:
    """What the written model makes: image and text features (B, E), (T, E) of unit length, and
    the factor of cosines.

    pixels: normalised images.
    """
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(out).eval()
    ids = AutoTokenizer.from_pretrained(out)(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = model(input_ids=ids["input_ids"], pixel_values=pixels)
    return found.image_embeds, found.text_embeds, float(model.logit_scale.exp())
