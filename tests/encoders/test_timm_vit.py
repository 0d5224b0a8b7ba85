"""TimmVit calls timm's own parts: parity with timm's own forward, for every kind of plain ViT."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from vlx.core.errors import ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig, PosEmbed
from vlx.encoders.published import check_statistics
from vlx.encoders.timm_vit import TimmVit

VARIANTS = [
    "vit_tiny_patch16_224",  # the plain one
    "deit3_small_patch16_224",  # no position for the class token, layer scale
    "vit_small_patch14_reg4_dinov2",  # registers, layer scale, no position for prefix tokens
    "vit_small_patch14_dinov2",  # layer scale
    "vit_base_patch16_clip_224",  # norm before the blocks
    "vit_medium_patch16_gap_256",  # no class token: refused or equal, never wrong
]


def make(name: str, **changes: object) -> TimmVit:
    """Two blocks of width 48 on 4x4 patches, every parameter with a value of its own."""
    patch = 14 if "patch14" in name else 16
    sizes = {"image_size": 4 * patch, "patch_size": patch, "dim": 48, "depth": 2, "heads": 3}
    encoder = TimmVit(EncoderConfig(name=name, **{**sizes, **changes}))  # type: ignore[arg-type]
    for index, param in enumerate(encoder.parameters()):
        generator = torch.Generator().manual_seed(index)
        param.data += 0.1 * torch.randn(param.shape, generator=generator)
    return encoder.eval()


def images_for(encoder: TimmVit) -> torch.Tensor:
    side = encoder.spec.image_size
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_equals_timms_forward_features(name: str) -> None:
    try:
        encoder = make(name)
    except ConfigError as error:
        assert "class token" in str(error)  # noqa: PT017 - either refused so, or equal below
        return
    images = images_for(encoder)
    with torch.no_grad():
        out = encoder(images)
        theirs = encoder.vit.forward_features(encoder.normalise(images))
    assert out.prefix.shape[1] == encoder.vit.num_prefix_tokens
    assert out.tokens.shape == (2, 16, 48)
    torch.testing.assert_close(torch.cat([out.prefix, out.tokens], 1), theirs)


@pytest.mark.parametrize("name", VARIANTS[:5])
def test_keeping_every_patch_permutes_the_tokens_and_nothing_else(name: str) -> None:
    encoder = make(name)
    images = images_for(encoder)
    keep = torch.stack([torch.randperm(16) for _ in range(2)])
    with torch.no_grad():
        whole, shuffled = encoder(images), encoder(images, keep=keep)
    expected = torch.stack([tokens[order] for tokens, order in zip(whole.tokens, keep)])
    torch.testing.assert_close(shuffled.tokens, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shuffled.prefix, whole.prefix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS[:5])
def test_dropped_patches_leave_no_trace(name: str) -> None:
    encoder = make(name)
    images = images_for(encoder)
    keep = torch.tensor([[0, 5, 10], [15, 1, 2]])
    with torch.no_grad():
        out = encoder(images, keep=keep)
        hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, keep, False)
        pixels = hidden.reshape(2, 1, 4, 4)
        side = encoder.spec.patch_size
        pixels = pixels.repeat_interleave(side, 2).repeat_interleave(side, 3)
        again = encoder(images.masked_fill(pixels, 0.123), keep=keep)
    assert out.tokens.shape == (2, 3, 48)
    assert torch.equal(out.tokens, again.tokens)
    assert torch.equal(out.prefix, again.prefix)


def test_layers_are_block_outputs_before_the_final_norm() -> None:
    encoder = make("vit_tiny_patch16_224", depth=3)
    images = images_for(encoder)
    with torch.no_grad():
        out = encoder(images, layers=(1, 3))
        x = encoder.embed(encoder.normalise(images))
        first = encoder.vit.blocks[0](x)
    assert out.layers.keys() == {1, 3}
    torch.testing.assert_close(out.layers[1], first)
    last = encoder.vit.norm(out.layers[3])
    torch.testing.assert_close(last[:, 1:], out.tokens)


def test_normalisation_equals_torchvisions() -> None:
    from torchvision.transforms.v2 import Normalize

    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    encoder = make("vit_base_patch16_clip_224", mean=mean, std=std)
    images = images_for(encoder)
    torch.testing.assert_close(encoder.normalise(images), Normalize(mean, std)(images))
    torch.testing.assert_close(encoder.denormalise(encoder.normalise(images)), images)
    with torch.no_grad():
        plain = encoder(images).tokens
        given = encoder(encoder.normalise(images), normalised=True).tokens
    assert torch.equal(plain, given)


def test_published_weights_want_their_own_statistics() -> None:
    name = "vit_base_patch16_clip_224.openai"
    with pytest.raises(ConfigError, match=r"mean=\[0\.485.*set mean=\[0\.481"):
        check_statistics(EncoderConfig(name=name))
    published = timm.get_pretrained_cfg(name)
    assert published is not None
    check_statistics(EncoderConfig(name=name, mean=[*published.mean], std=[*published.std]))


def test_sincos_leaves_the_table_fixed_and_learned_trains_it() -> None:
    fixed = make("vit_tiny_patch16_224", pos_embed=PosEmbed.sincos).vit.pos_embed
    learned = make("vit_tiny_patch16_224").vit.pos_embed
    assert fixed is not None
    assert learned is not None
    assert not fixed.requires_grad
    assert learned.requires_grad


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "resnet18"}, "not|does not take"),
        ({"name": "swin_tiny_patch4_window7_224"}, "not a plain ViT|does not take"),
        ({"image_size": 63}, "image_size=63 is not a multiple of the patch size 16"),
        ({"dim": 50}, "does not take"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes: dict, words: str) -> None:
    sizes = {
        "name": "vit_tiny_patch16_224",
        "image_size": 64,
        "patch_size": 16,
        "dim": 48,
        "depth": 1,
    }
    with pytest.raises(ConfigError, match=words) as caught:
        TimmVit(EncoderConfig(**{**sizes, "heads": 3, **changes}))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_missing_role_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"set teacher\.name"):
        EncoderBuilder({"teacher": None}, 0).vision("teacher")


def test_every_variant_is_a_plain_vit_of_timm() -> None:
    for name in VARIANTS[:5]:
        assert isinstance(make(name).backbone, VisionTransformer)
