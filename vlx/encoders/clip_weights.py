"""CLIP's published weights under the names that vlx gives them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from timm.models.byobnet import ByobNet, checkpoint_filter_fn
from torch import Tensor, nn

from vlx.core.errors import CheckpointError
from vlx.core.text import Tokenizer
from vlx.encoders.checkpoint import POOLED, check_rows, fit_positions, load_whole, read_weights
from vlx.encoders.cleaned import CleanedTokenizer
from vlx.encoders.tokenizers import FILE, BpeTokenizer, bpe_bytes

# Pattern of a published name -> ours; of the blocks `\2` is what is inside one.
_HF = (
    (r"vision_model\.embeddings\.class_embedding", "image.vit.cls_token"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "image.vit.pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding\.(\w+)", r"image.vit.patch_embed.proj.\1"),
    (r"vision_model\.pre_layrnorm\.(\w+)", r"image.vit.norm_pre.\1"),
    (r"vision_model\.post_layernorm\.(\w+)", r"image.vit.norm.\1"),
    (r"vision_model\.encoder\.layers\.(\d+)\.(.+)", r"image.vit.blocks.\1.\2"),
    (r"text_model\.embeddings\.token_embedding\.weight", "text.tokens.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "text.positions"),
    (r"text_model\.final_layer_norm\.(\w+)", r"text.norm.\1"),
    (r"text_model\.encoder\.layers\.(\d+)\.(.+)", r"text.blocks.\1.\2"),
    (r"visual_projection\.weight", "image.vit.head.weight"),
    (r"text_projection\.weight", "projection.weight"),
)
_OPENAI = (
    (r"visual\.class_embedding", "image.vit.cls_token"),
    (r"visual\.positional_embedding", "image.vit.pos_embed"),
    (r"visual\.conv1\.weight", "image.vit.patch_embed.proj.weight"),
    (r"visual\.ln_pre\.(\w+)", r"image.vit.norm_pre.\1"),
    (r"visual\.ln_post\.(\w+)", r"image.vit.norm.\1"),
    (r"visual\.transformer\.resblocks\.(\d+)\.(.+)", r"image.vit.blocks.\1.\2"),
    (r"token_embedding\.weight", "text.tokens.weight"),
    (r"positional_embedding", "text.positions"),
    (r"ln_final\.(\w+)", r"text.norm.\1"),
    (r"transformer\.resblocks\.(\d+)\.(.+)", r"text.blocks.\1.\2"),
    (r"visual\.proj", "image.vit.head.weight"),
    (r"text_projection", "projection.weight"),
)
_TRUNK = "visual.trunk."  # open_clip's for a model of timm
_TIMM_TOWER = ((r"visual\.head\.proj\.weight", "image.model.head.weight"), *_OPENAI)
_INSIDE = (
    (r"layer_norm(\d)\.|ln_(\d)\.", r"norm\1\2."),
    (r"self_attn\.out_proj\.|attn\.out_proj\.", "attn.proj."),
    (r"attn\.in_proj_", "attn.qkv."),
    (r"mlp\.c_fc\.", "mlp.fc1."),
    (r"mlp\.c_proj\.", "mlp.fc2."),
)
_TOKENS = "text.tokens.weight"
_NOT_WEIGHTS = ("position_ids", "input_resolution", "context_length", "vocab_size", "attn_mask")


def load_clip(towers: nn.Module, logit_scale: nn.Module, path: str) -> None:
    """Load both towers and the temperature from Hugging Face's, OpenAI's, open_clip's or vlx's own
    names.

    The position table of another image size is resampled, a ResNet's of its attention pooling too.
    Raises `CheckpointError` naming the keys that do not fit; nothing is loaded then.
    """
    own, scale = _opened(towers, path)
    state = towers.state_dict()
    spec = towers.image.spec  # type: ignore[union-attr]
    for key in ("image.vit.pos_embed", "image.model.pos_embed", f"image.model.{POOLED}"):
        fit_positions(state, own, spec.grid, spec.num_prefix, key)  # type: ignore[arg-type]
    load_whole(towers, own, path)
    _set_scale(logit_scale, scale)


def load_text_side(towers: nn.Module, logit_scale: nn.Module, path: str) -> None:
    """Load the text tower, its projection and the temperature alone, from whatever `load_clip`
    reads; its image tower may be any. Raises as that does."""
    own, scale = _opened(towers, path)
    side = nn.ModuleDict({"text": towers.text, "projection": towers.projection})  # type: ignore
    own = {key: value for key, value in own.items() if key.startswith(("text.", "projection."))}
    load_whole(side, own, path)
    _set_scale(logit_scale, scale)


def _opened(towers: nn.Module, path: str) -> tuple[dict[str, Tensor], Tensor]:
    """A file's tensors under the towers' names, and the logarithm of its multiplier."""
    check_tokenizer(towers.tokenizer, path)  # type: ignore[arg-type]
    named = _named(path, towers.image.backbone)  # type: ignore[union-attr, arg-type]
    own = {key.removeprefix("towers."): value for key, value in named.items()}
    scale = own.pop("logit_scale", None)
    if scale is None:
        scale = own.pop("logit_scale.log", None)
    if scale is None or not own:
        raise CheckpointError(f"{path} holds no CLIP: no logit_scale, or no towers")
    table = towers.state_dict().get(_TOKENS)
    if table is not None:
        check_rows(towers.tokenizer, table, own.get(_TOKENS), path)  # type: ignore[arg-type]
    return own, scale


@torch.no_grad()
def _set_scale(logit_scale: nn.Module, log: Tensor) -> None:
    logit_scale.log.copy_(log)  # type: ignore[union-attr, operator]


def check_tokenizer(tokenizer: Tokenizer, path: str) -> None:
    """Raise `CheckpointError` where a run was trained with other ids than these."""
    file = Path(path).expanduser() / FILE
    if not file.is_file():
        return
    if isinstance(tokenizer, CleanedTokenizer):
        tokenizer = tokenizer.inner
    if not isinstance(tokenizer, BpeTokenizer) or bpe_bytes(tokenizer) != file.read_bytes():
        raise CheckpointError(
            f"{path} was trained with its own tokenizer, not with {tokenizer.name}: set "
            f"text.tokenizer={path}"
        )


def _named(path: str | Path, backbone: nn.Module) -> dict[str, Tensor]:
    """A file's tensors under our names, joint projections and added axes in place.

    backbone: of the image tower; timm names a ResNet's tensors for it.
    """
    state = {k: v for k, v in read_weights(path).items() if not k.endswith(_NOT_WEIGHTS)}
    if any(key.startswith("vision_model.") for key in state):
        state = _joined({_renamed(key, _HF): value for key, value in state.items()})
    elif "visual.attnpool.c_proj.weight" in state:
        if not isinstance(backbone, ByobNet):
            raise CheckpointError(
                f"{path} holds a CLIP whose image tower is a ResNet, and the encoder is a "
                f"{type(backbone).__name__}, nothing was loaded: set encoder=clip_rn50 or another "
                "of timm's CLIP ResNets"
            )
        return _resnet(state, backbone)
    elif any(key.startswith(_TRUNK) for key in state):
        return _timm_tower(state)
    elif any(key.startswith("visual.") for key in state):
        state = {_renamed(key, _OPENAI): value.float() for key, value in state.items()}
        for key in state.keys() & {"image.vit.head.weight", "projection.weight"}:
            state[key] = state[key].T.contiguous()  # theirs multiply from the right
    else:
        return state
    for key in state.keys() & {"image.vit.cls_token", "image.vit.pos_embed"}:
        state[key] = state[key].reshape(1, -1, state[key].shape[-1])
    return state


def _resnet(state: dict[str, Tensor], backbone: ByobNet) -> dict[str, Tensor]:
    """OpenAI's names of a CLIP whose image tower is a ResNet."""
    image = checkpoint_filter_fn(state, backbone)
    text = {key: value for key, value in state.items() if not key.startswith("visual.")}
    named = {f"image.model.{key}": value for key, value in image.items()}
    named |= {_renamed(key, _OPENAI): value for key, value in text.items()}
    named["projection.weight"] = named["projection.weight"].T.contiguous()
    return {key: value.float() for key, value in named.items()}


def _timm_tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names of a CLIP whose image tower is timm's, with a projection of its own."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(_TRUNK):
            ours = f"image.model.{key.removeprefix(_TRUNK)}"
        else:
            ours = _renamed(key.removeprefix("text."), _TIMM_TOWER)
        named[ours] = (value.T if ours == "projection.weight" else value).float().contiguous()
    return named


def _renamed(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in table:
        found = re.fullmatch(pattern, key)
        if found is None:
            continue
        key = found.expand(ours)
        for inside, name in _INSIDE:
            key = re.sub(rf"(?<=\.){inside}", lambda m, to=name: m.expand(to), key)
        return key
    return key


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's three projections of attention as one."""
    joined: dict[str, Tensor] = {}
    for key, value in state.items():
        found = re.fullmatch(r"(.+)\.self_attn\.q_proj\.(\w+)", key)
        if found:
            block, kind = found[1], found[2]
            parts = [state[f"{block}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            joined[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", key):
            joined[key] = value
    return joined
