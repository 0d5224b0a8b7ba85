"""Released files load under their official names and sizes (`released/*.txt`, of small models).

That the numbers are the official code's too was compared by hand: CvT, RMT, SViT and ChannelViT
give its logits to 3e-6 (ChannelViT but for positions: of more than one channel that code resamples
them to the size that they have, and they come out a little shifted).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from vlx.core.errors import CheckpointError
from vlx.encoders.base import VisionEncoder
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "cvt": ("cvt_13", {"embed_dims": [16, 32, 48], "depths": [1, 1, 2], "num_heads": [1, 2, 3]}),
    "rmt": (
        "rmt_tiny",
        {
            "embed_dims": [32, 32, 64, 64], "depths": [1, 1, 2, 1], "num_heads": [2, 2, 4, 4],
            "head_ranges": [4, 4, 6, 6], "ffn_ratios": [3, 3, 3, 3], "projection": 40,
            "decomposed": [True, True, False, False], "layer_scales": [False, False, True, True],
        },
    ),
    "svit": (
        "svit_small",
        {
            "dims": [16, 32, 48, 64], "depths": [1, 2, 1, 1], "heads": [1, 2, 3, 4],
            "super_tokens": [4, 2, 1, 1], "head_dim": 40, "layer_scale": [None, None, 0.1, 0.1],
        },
    ),
    "channelvit": ("channelvit_tiny_patch16_224", {"depth": 1}),
}  # fmt: skip
# Of each, tensors by their official name and by ours.
PAIRS = {
    "cvt": {
        "stage1.patch_embed.proj.weight": "stages.1.embed.proj.weight",
        "stage2.cls_token": "stages.2.cls_token",
        "stage2.blocks.1.attn.conv_proj_k.bn.bias": "stages.2.blocks.1.attn.conv_k.1.bias",
        "stage2.blocks.1.attn.proj_v.bias": "stages.2.blocks.1.attn.v.bias",
        "stage2.blocks.1.attn.proj.bias": "stages.2.blocks.1.attn.proj.bias",
    },
    "rmt": {
        "patch_embed.proj.9.weight": "stages.0.down.9.weight",
        "layers.0.downsample.norm.running_mean": "stages.1.down.1.running_mean",
        "layers.2.blocks.1.retention.out_proj.weight": "stages.2.blocks.1.attn.proj.weight",
        "layers.2.blocks.1.gamma_2": "stages.2.blocks.1.gamma2",
        "layers.3.blocks.0.ffn.dwconv.conv.weight": "stages.3.blocks.0.ffn.conv.weight",
    },
    "svit": {
        "layers.1.downsample.proj.0.weight": "stages.2.downsample.0.weight",
        "layers.1.blocks.1.attn.stoken_refine.qkv.bias":
            "stages.1.blocks.1.attn.attention.qkv.bias",
        "layers.3.blocks.0.mlp2.conv.conv.bias": "stages.3.blocks.0.mlp.conv.bias",
        "layers.3.blocks.0.gamma_1": "stages.3.blocks.0.ls1.gamma",
        "norm.weight": "head_norm.weight",
    },
    "channelvit": {
        "patch_embed.proj.weight": "patch_embed.proj.weight",
        "patch_embed.channel_embed.weight": "patch_embed.channel_embed.weight",
        "blocks.0.attn.qkv.weight": "blocks.0.attn.qkv.weight",
    },
}  # fmt: skip
LEFT_OUT = ("Relpos", "fold.weights")
"""Tables that follow from the sizes."""


def released(name: str) -> dict[str, Tensor]:
    """Random tensors by the official names, in the official sizes."""
    state = {}
    for line in (Path(__file__).parent / "released" / f"{name}.txt").read_text().splitlines():
        key, _, sizes = line.partition(" ")
        shape = [int(size) for size in sizes.split("x")] if sizes else []
        count = key.endswith("num_batches_tracked")
        state[key] = torch.tensor(3) if count else torch.randn(shape)
    return state


def load(name: str, file: Path, num_classes: int = 7) -> VisionEncoder:
    model, sizes = SIZES[name]
    depth = sizes.get("depth")
    cfg = EncoderConfig(name=model, image_size=32, depth=depth, checkpoint=str(file))
    arguments = {key: value for key, value in sizes.items() if key != "depth"}
    builder = EncoderBuilder({"encoder": cfg}, num_classes)
    return builder.vision(num_classes=num_classes, arguments=arguments)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", SIZES)
def test_the_official_names_and_sizes_load(tmp_path: Path, name: str, prefix: str) -> None:
    state = released(name)
    torch.save({"model": {prefix + k: v for k, v in state.items()}}, tmp_path / "weights.pth")
    own = load(name, tmp_path / "weights.pth").backbone.state_dict()
    for theirs, ours in PAIRS[name].items():
        assert torch.equal(own[ours].flatten(), state[theirs].flatten()), theirs
    given = [value for key, value in state.items() if not any(o in key for o in LEFT_OUT)]
    assert len(given) == len(own)

    def total(tensors) -> float:
        return sum(float(value.double().sum()) for value in tensors)

    assert total(own.values()) == pytest.approx(total(given))  # each once, and nothing else
    torch.save(own, tmp_path / "own.pth")  # our own names go in as they are
    again = load(name, tmp_path / "own.pth").backbone.state_dict()
    assert all(torch.equal(again[key], own[key]) for key in own)


@pytest.mark.parametrize("name", SIZES)
def test_a_file_of_another_size_loads_nothing(tmp_path: Path, name: str) -> None:
    state = released(name)
    key = next(key for key in state if "fc1.weight" in key)
    torch.save({**state, key: torch.rand(3, 3)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        load(name, tmp_path / "weights.pth")


def test_hugging_faces_cvt_gives_its_logits(tmp_path: Path) -> None:
    """With its GELU in the place of the official QuickGELU."""
    from transformers import CvtConfig, CvtForImageClassification

    sizes = {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}
    theirs = CvtForImageClassification(CvtConfig(**sizes, num_labels=7)).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value += 0.05 * torch.randn_like(value)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    cfg = EncoderConfig(name="cvt_13", image_size=64, checkpoint=str(tmp_path / "weights.pth"))
    arguments = {"embed_dims": [16, 32, 48], "depths": [1, 2, 3], "num_heads": [1, 2, 3]}
    builder = EncoderBuilder({"encoder": cfg}, 7)
    model = builder.vision(
        num_classes=7, arguments={**arguments, "act_layer": nn.GELU}
    ).backbone.eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("swag", [False, True])
def test_torchvisions_vit_and_swags_give_its_logits(tmp_path: Path, swag: bool) -> None:
    theirs = VisionTransformer(32, 8, 2, 4, 48, 192, num_classes=7).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value += 0.05 * torch.randn_like(value)
    state = dict(theirs.state_dict())
    if swag:  # the names of its own repository; places come first in its table
        for key in list(state):
            new = key.replace("encoder_layer_", "layer_").replace("heads.head", "head.layers.head")
            new = new.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")
            state[new] = state.pop(key)
        state["encoder.pos_embedding"] = state["encoder.pos_embedding"].transpose(0, 1)
    torch.save(state, tmp_path / "weights.pth")
    sizes = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 2, "heads": 4}
    cfg = EncoderConfig(
        name="vit_tiny_patch16_224", checkpoint=str(tmp_path / "weights.pth"), **sizes
    )
    encoder = EncoderBuilder({"encoder": cfg}, 7).vision(num_classes=7).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        ours = encoder.backbone(images)
        torch.testing.assert_close(ours, theirs(images), atol=1e-5, rtol=1e-5)
