"""TimmVit calls timm's own parts: parity with timm's own forward, for every kind of plain ViT."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from vlx.core.errors import ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig, PosEmbed
from vlx.encoders.published import check_activation, check_statistics
from vlx.encoders.timm_vit import TimmVit
from vlx.evals.tokens import gmacs

VARIANTS = [
    "vit_tiny_patch16_224",  # the plain one
    "deit3_small_patch16_224",  # no position for the class token, layer scale
    "vit_small_patch14_reg4_dinov2",  # registers, layer scale, no position for prefix tokens
    "vit_small_patch14_dinov2",  # layer scale
    "vit_base_patch16_clip_224",  # norm before the blocks
    "deit_tiny_distilled_patch16_224",  # a class token and a distillation token
    "vit_small_patch16_18x2_224",  # parallel attentions in a block
    "vit_medium_patch16_gap_256",  # no class token
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
    encoder = make(name)
    images = images_for(encoder)
    with torch.no_grad():
        out = encoder(images)
        theirs = encoder.vit.forward_features(encoder.normalise(images))
    assert out.prefix.shape[1] == encoder.vit.num_prefix_tokens
    assert out.tokens.shape == (2, 16, 48)
    torch.testing.assert_close(torch.cat([out.prefix, out.tokens], 1), theirs)


@pytest.mark.parametrize("name", VARIANTS)
def test_keeping_every_patch_permutes_the_tokens_and_nothing_else(name: str) -> None:
    encoder = make(name)
    images = images_for(encoder)
    keep = torch.stack([torch.randperm(16) for _ in range(2)])
    with torch.no_grad():
        whole, shuffled = encoder(images), encoder(images, keep=keep)
    expected = torch.stack([tokens[order] for tokens, order in zip(whole.tokens, keep)])
    torch.testing.assert_close(shuffled.tokens, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shuffled.prefix, whole.prefix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
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
    for name in VARIANTS:
        assert isinstance(make(name).backbone, VisionTransformer)


def test_quickgelu_weights_are_refused_for_a_gelu_model() -> None:
    statistics = {"mean": [0.48145466, 0.4578275, 0.40821073]}
    statistics["std"] = [0.26862954, 0.26130258, 0.27577711]
    name = "vit_base_patch16_clip_{}224.openai"
    encoder = make("vit_base_patch16_clip_224")
    cfg = EncoderConfig(name=name.format(""), **statistics)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"set name=vit_base_patch16_clip_quickgelu_224\.openai"):
        check_activation(encoder, cfg)
    quick = make("vit_base_patch16_clip_quickgelu_224")
    check_activation(quick, EncoderConfig(name=name.format("quickgelu_")))


def test_every_model_with_a_linear_head_can_be_a_projection_without_bias() -> None:
    for name in ("deit_tiny_patch16_224", "resnet18", "vitamin_small_224"):
        builder = EncoderBuilder({"encoder": EncoderConfig(name=name)}, 0)
        names = [n for n, _ in builder.vision(num_classes=384, head_bias=False).named_parameters()]
        classifier = "fc" if name == "resnet18" else "head"
        assert f"{classifier}.weight" in {n.split(".", 1)[1] for n in names}
        assert f"{classifier}.bias" not in {n.split(".", 1)[1] for n in names}


def test_vitamin_has_the_papers_parameters_and_trains_them_all() -> None:
    with torch.device("meta"):
        builder = EncoderBuilder({"encoder": EncoderConfig(name="vitamin_small_224")}, 0)
        tower = builder.vision(num_classes=384, head_bias=False)
        tower.classify(tower(torch.empty(2, 3, 224, 224))).sum().backward()
    assert sum(p.numel() for p in tower.parameters()) == 22_025_152
    assert all(p.grad is not None for p in tower.parameters())


def test_attention_pooling_is_counted_without_gradients_of_the_caller() -> None:
    encoder = EncoderBuilder(
        {"encoder": EncoderConfig(name="vit_base_patch16_siglip_224", dim=48, depth=1, heads=3)}, 0
    ).vision(num_classes=5)
    with torch.no_grad():
        found = gmacs(lambda x: encoder.classify(encoder(x)), 224, torch.device("cpu"))
    tokens, dim, hidden = 196, 48, (48 * 4)
    embedding = tokens * 16 * 16 * 3 * dim
    block = tokens * dim * (4 * dim + 2 * hidden) + 2 * tokens**2 * dim
    pool = dim * (2 * tokens * dim + 2 * dim + 2 * hidden) + 2 * tokens * dim
    assert found * 1e9 == pytest.approx(embedding + block + pool + 5 * dim, rel=1e-6)
