"""Every backbone that a paper registers keeps timm's conventions; shapes on the meta device."""

from __future__ import annotations

from functools import lru_cache

import pytest
import timm
import torch
from timm.layers.layer_scale import LayerScale
from timm.models.pit import PoolingVisionTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlx.core import registry
from vlx.encoders.timm_backbone import register_backbones

NAMES = [name for paper in registry.papers().values() for name in paper.backbones]

pytestmark = pytest.mark.parametrize("name", NAMES)


def create(name: str, **arguments) -> nn.Module:
    register_backbones(name)
    with torch.device("meta"):
        return timm.create_model(name, **arguments).eval()


@lru_cache
def unchanged(name: str) -> nn.Module:
    """One for all tests that leave it as it is."""
    return create(name)


def images_for(model: nn.Module) -> torch.Tensor:
    return torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")  # type: ignore


@torch.no_grad()
def test_features_and_head_make_the_logits(name: str) -> None:
    model = unchanged(name)
    images = images_for(model)
    features = model.forward_features(images)  # type: ignore[operator]
    assert model.forward_head(features).shape == model(images).shape == (2, 1000)  # type: ignore
    hidden = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    assert hidden.shape == (2, model.head_hidden_size)
    assert model.num_features in (features.shape[1], features.shape[-1])


@torch.no_grad()
def test_the_classifier_can_be_replaced_and_left_out(name: str) -> None:
    model = create(name)
    assert model.get_classifier().out_features == model.num_classes == 1000  # type: ignore
    with torch.device("meta"):
        model.reset_classifier(5)  # type: ignore[operator]
    assert model.num_classes == 5
    assert model(images_for(model)).shape == (2, 5)
    model.reset_classifier(0)  # type: ignore[operator]
    assert isinstance(model.get_classifier(), nn.Identity)  # type: ignore[operator]
    assert model(images_for(model)).shape == (2, model.head_hidden_size)
    assert isinstance(create(name, num_classes=0).get_classifier(), nn.Identity)  # type: ignore


@torch.no_grad()
def test_features_only_gives_the_maps_that_feature_info_promises(name: str) -> None:
    whole = unchanged(name)
    model = create(name, features_only=True)
    images = images_for(whole)
    maps = model(images)
    side = images.shape[-1]
    assert len(maps) == len(model.feature_info.channels())  # type: ignore[union-attr]
    info = model.feature_info  # type: ignore[union-attr]
    for features, channels, reduction in zip(maps, info.channels(), info.reduction()):
        if features.shape[-1] == channels and features.shape[1] != channels:
            features = features.permute(0, 3, 1, 2)  # as timm's Swin gives its maps
        assert features.shape == (2, channels, side // reduction, side // reduction)
    one = create(name, features_only=True, out_indices=(0,))(images)
    assert [features.shape for features in one] == [maps[0].shape]


@torch.no_grad()
def test_intermediates_can_be_taken(name: str) -> None:
    model = unchanged(name)
    images = images_for(model)
    if not hasattr(model, "forward_intermediates"):
        pytest.skip("features_only goes by timm's FeatureListNet")
    _, maps = model.forward_intermediates(images, indices=1)  # type: ignore[operator]
    assert len(maps) == 1


@torch.no_grad()
def test_the_last_map_is_the_features(name: str) -> None:
    """By value, for the smallest of each class that has timm's function."""
    shapes = unchanged(name)
    if not hasattr(shapes, "forward_intermediates") or name != smallest_of(type(shapes)):
        pytest.skip("as another of its class")
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for part in model.modules():
        if isinstance(part, LayerScale):
            torch.nn.init.ones_(part.gamma)  # what a block adds must be seen
    images = torch.rand(1, *model.pretrained_cfg["input_size"])
    features = model.forward_features(images)
    last, maps = model.forward_intermediates(images, indices=1)
    if isinstance(model, PoolingVisionTransformer):  # timm's ends in its class token
        features = features[:, :1]
    torch.testing.assert_close(last, features)
    patches = maps[0].flatten(2).transpose(1, 2)
    if isinstance(model, VisionTransformer):
        end = features[:, model.num_prefix_tokens :]
        if end.shape == patches.shape:
            torch.testing.assert_close(model.norm(patches), end)


def smallest_of(cls: type) -> str:
    def size(name: str) -> int:
        return sum(param.numel() for param in unchanged(name).parameters())

    return min((n for n in NAMES if type(unchanged(n)) is cls), key=size)


def test_what_is_not_decayed_exists(name: str) -> None:
    model = unchanged(name)
    names = {key for key, _ in model.named_parameters()}
    known = {
        "cls_token",
        "reg_token",
        "dist_token",
    }  # timm's ViT names these whether it has them or not
    assert model.no_weight_decay() - known <= names  # type: ignore[operator]


def test_the_registry_knows_it(name: str) -> None:
    unchanged(name)
    assert timm.is_model(name)
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    assert not cfg.has_weights
