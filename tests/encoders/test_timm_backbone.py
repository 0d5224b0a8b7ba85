"""Models that are no plain ViT: timm's own numbers behind the same interface."""

from __future__ import annotations

import pytest
import timm
import torch

from vlx.core.errors import CheckpointError, ConfigError
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


def resnet(num_classes: int = 0, **keys: object):
    cfg = EncoderConfig(name="resnet18", image_size=64, **keys)  # type: ignore[arg-type]
    return EncoderBuilder({"encoder": cfg}, num_classes).vision(num_classes=num_classes).eval()


def test_torchvisions_file_gives_its_own_maps(tmp_path, caplog) -> None:
    from torchvision.models import resnet18

    theirs = resnet18().eval()
    for name, value in theirs.named_buffers():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    # Its older files, resnet50-19c8e357.pth among them, have no counters of batches.
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("_tracked")}
    torch.save(state, tmp_path / "weights.pth")
    images = torch.rand(2, 3, 64, 64)
    maps = torch.nn.Sequential(*list(theirs.children())[:-2])
    with torch.no_grad():
        for classes in (0, 7, 1000):
            ours = resnet(classes, checkpoint=str(tmp_path / "weights.pth"))
            pixels = ours.normalise(images)
            out = ours(images)
            torch.testing.assert_close(out.features, maps(pixels))
        torch.testing.assert_close(ours.classify(out), theirs(pixels))
    assert "classifies 1000 classes and the data has 7: the head is new" in caplog.text


def test_a_file_of_another_depth_loads_nothing_and_names_the_keys(tmp_path) -> None:
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(CheckpointError, match=r"unexpected: layer1\.2\.bn1\.bias"):
        resnet(7, checkpoint=str(tmp_path / "resnet34.pth"))


def test_a_head_of_another_width_is_no_matter_of_classes(tmp_path, caplog) -> None:
    def small(dim: int, checkpoint: str | None = None):
        sizes = {"image_size": 32, "patch_size": 16, "dim": dim, "depth": 1, "heads": 1}
        cfg = EncoderConfig(name="vit_tiny_patch16_224", checkpoint=checkpoint, **sizes)
        return EncoderBuilder({"encoder": cfg}, 7).vision(num_classes=7)

    file = str(tmp_path / "weights.pth")
    torch.save(small(24).backbone.state_dict(), file)
    with pytest.raises(
        CheckpointError, match=r"nothing was loaded\. 1\d reshaped.*encoder=, text="
    ):
        small(48, file)
    assert "the head is new" not in caplog.text


def test_published_weights_are_loaded_beside_a_head_of_other_classes(monkeypatch) -> None:
    from timm.models import _builder

    torch.manual_seed(1)
    state = timm.create_model("resnet18").state_dict()
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *a, **k: dict(state))
    for classes in (0, 7):
        loaded = resnet(classes, pretrained=True).backbone.state_dict()
        body = [name for name in loaded if not name.startswith("fc.")]
        assert len(body) == len(state) - 2
        assert all(torch.equal(loaded[name], state[name]) for name in body)
    with pytest.raises(ConfigError, match=r"mean=\[0\.5, 0\.5, 0\.5\] is not that of the weights"):
        resnet(7, pretrained=True, mean=[0.5] * 3)


def test_published_weights_out_of_reach_are_one_clear_line(monkeypatch) -> None:
    from timm.models import _builder

    def offline(*args: object, **kwargs: object):
        raise FileNotFoundError("no connection,\nno file")

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", offline)
    for name in ("resnet18", "deit_tiny_patch16_224"):
        cfg = EncoderConfig(name=name, pretrained=True)
        with pytest.raises(CheckpointError, match=r"cannot be fetched.*checkpoint=FILE") as caught:
            EncoderBuilder({"encoder": cfg}, 0).vision()
        assert "\n" not in str(caught.value)
    nameless = EncoderConfig(name="test_vit", pretrained=True)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    with pytest.raises(ConfigError, match="timm publishes no weights of test_vit"):
        EncoderBuilder({"encoder": nameless}, 0).vision()


def test_published_weights_leave_a_projection_without_bias(monkeypatch) -> None:
    from timm.models import _builder

    name = "deit_tiny_patch16_224"
    state = timm.create_model(name).state_dict()
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *a, **k: dict(state))
    builder = EncoderBuilder({"encoder": EncoderConfig(name=name, pretrained=True)}, 0)
    loaded = builder.vision(num_classes=32, head_bias=False).backbone.state_dict()
    assert "head.bias" not in loaded
    assert torch.equal(loaded["pos_embed"], state["pos_embed"])
