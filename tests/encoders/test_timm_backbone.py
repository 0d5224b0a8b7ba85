"""Models that are no plain ViT: timm's own numbers behind the same interface."""

from __future__ import annotations

import pytest
import timm
import torch

from vlx.core.errors import ConfigError
from vlx.encoders.base import EncoderFeatures
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig

MODELS = {  # name -> side of the last feature map at 64 pixels
    "resnet18": 2,  # B D h w
    "swin_tiny_patch4_window7_224": 2,  # B h w D
    "convnext_atto": 2,
    "mixer_s32_224": 2,  # B N D
    "eva02_tiny_patch14_224": 4,  # a ViT with rotary positions and a class token
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_maps_are_timms(name: str) -> None:
    side = 56 if "patch14" in name else 64
    torch.manual_seed(0)
    builder = EncoderBuilder({"encoder": EncoderConfig(name=name, image_size=side)}, 7)
    encoder = builder.vision(num_classes=7).eval()
    model = encoder.backbone
    images = torch.rand(2, 3, side, side)
    with torch.no_grad():
        out = encoder(images)
        assert torch.equal(encoder.classify(out), model(encoder.normalise(images)))
        maps = EncoderFeatures(encoder).patch_features(images)
    cells = MODELS[name]
    assert maps.shape == (2, encoder.spec.dim, cells, cells)
    if name in ("resnet18", "convnext_atto"):
        torch.testing.assert_close(maps, model.forward_features(encoder.normalise(images)))  # type: ignore[operator]
    assert encoder.spec.dim == model.num_features


def test_an_unknown_model_names_the_nearest() -> None:
    builder = EncoderBuilder({"encoder": EncoderConfig(name="resnet19")}, 7)
    with pytest.raises(ConfigError, match=r"no timm model 'resnet19'. Did you mean resnet1"):
        builder.vision()


def test_a_backbone_refuses_what_needs_a_plain_vit() -> None:
    cfg = EncoderConfig(name="resnet18", image_size=32)
    encoder = EncoderBuilder({"encoder": cfg}, 0).vision()
    with pytest.raises(ConfigError, match="ResNet takes whole images only"):
        encoder(torch.rand(1, 3, 32, 32), keep=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ConfigError, match="deit_small_patch16_224"):
        encoder.check_hooks()


def test_weights_of_a_file_are_loaded_strictly(tmp_path) -> None:
    model = timm.create_model("resnet18", num_classes=0)
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    cfg = EncoderConfig(name="resnet18", image_size=32, checkpoint=str(file))
    encoder = EncoderBuilder({"encoder": cfg}, 0).vision()
    for name, value in model.state_dict().items():
        assert torch.equal(encoder.backbone.state_dict()[name], value)
