"""ChannelViT: the card's checks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from tests.contract.build import NUM_CLASSES, build, config, context, smoke_batch
from vlx.commands.dry_run import measure
from vlx.core.capability import ChannelSubsets
from vlx.core.errors import ConfigError
from vlx.core.step import StepContext
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig
from vlx.methods.channelvit import ChannelVit, ChannelVitClassifier, draw_channels

ALL = range(3)


def small(in_chans: int = 3) -> ChannelVit:
    """16 patches a channel, every weight random."""
    torch.manual_seed(0)
    model = ChannelVit(
        img_size=16, patch_size=4, in_chans=in_chans, embed_dim=24, depth=2, num_heads=3,
        num_classes=5,
    )  # fmt: skip
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model.eval()


def method_of(encoder: EncoderConfig, **changes) -> ChannelVitClassifier:
    torch.manual_seed(0)
    builder = EncoderBuilder({"encoder": encoder}, NUM_CLASSES, load_weights=False)
    return ChannelVitClassifier(replace(config("channelvit").method, **changes), builder)


@pytest.mark.parametrize(
    ("name", "plain", "arguments", "params", "tokens"),
    [
        ("channelvit_small_patch16_224", 22_050_664, {}, 21_855_208, 589),
        ("channelvit_small_patch8_224", 21_855_137, {"in_chans": 8, "num_classes": 161},
         21_686_177, 6273),
    ],
)  # fmt: skip
def test_parameters_and_tokens_are_the_cards(
    name: str, plain: int, arguments: dict, params: int, tokens: int
) -> None:
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name, **arguments).eval()
        images = torch.empty(1, model.in_chans, 224, 224)
        assert model.forward_features(images).shape == (1, tokens, 384)
        baseline = timm.create_model(name.replace("channelvit", "vit"), **arguments)
    assert sum(p.numel() for p in model.parameters()) == params
    assert sum(p.numel() for p in baseline.parameters()) == plain
    channels, patch = model.in_chans, model.patch_embed.patch_size[0]
    # A kernel of one channel instead of C, and C channel embeddings.
    assert plain - params == (channels - 1) * patch**2 * 384 - channels * 384


@pytest.mark.parametrize(("name", "dim"), [("tiny", 192), ("small", 384), ("base", 768)])
def test_every_variant_differs_from_timms_vit_by_its_embedding_alone(name: str, dim: int) -> None:
    with torch.device("meta"):
        ours = timm.create_model(f"channelvit_{name}_patch16_224")
        theirs = timm.create_model(f"vit_{name}_patch16_224")
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    plain = {key: value.shape for key, value in theirs.state_dict().items()}
    assert shapes.pop("patch_embed.channel_embed.weight") == (3, dim)
    assert shapes.pop("patch_embed.proj.weight") == (dim, 1, 16, 16)
    plain.pop("patch_embed.proj.weight")
    assert shapes == plain  # the position table has 1 + N rows


def test_a_token_is_projection_plus_position_plus_channel() -> None:
    model, images = small(), torch.rand(2, 3, 16, 16)
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    table, pos = model.patch_embed.channel_embed.weight, model.pos_embed
    assert pos is not None
    with torch.no_grad():
        x = model.embed(images)
        assert x.shape == (2, 1 + 3 * 16, 24)
        torch.testing.assert_close(x[:, 0], (model.cls_token + pos[:, :1])[:, 0].expand(2, -1))
        for channel in ALL:
            for patch in range(16):
                row, column = 4 * (patch // 4), 4 * (patch % 4)
                pixels = images[:, channel, row : row + 4, column : column + 4]
                expected = torch.einsum("bij,dij->bd", pixels, weight[:, 0]) + bias
                expected = expected + pos[0, 1 + patch] + table[channel]
                found = x[:, 1 + channel * 16 + patch]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_channels_are_a_set() -> None:
    model, images = small(), torch.rand(2, 3, 16, 16)
    swapped = images[:, [2, 1, 0]]
    with torch.no_grad():
        straight = model(images)
        named = model(swapped, torch.tensor([2, 1, 0]))
        torch.testing.assert_close(named, straight, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(swapped), straight, atol=1e-3)
        by_image = torch.tensor([[2, 1, 0], [0, 1, 2]])
        mixed = torch.stack([swapped[0], images[1]])
        torch.testing.assert_close(model(mixed, by_image), straight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [[0], [0, 2], [1, 2]])
def test_a_subset_equals_masking_the_other_channels_tokens(kept: list[int]) -> None:
    model, images = small(), torch.rand(2, 3, 16, 16)
    seen = torch.zeros(1 + 48, dtype=torch.bool)
    seen[0] = True
    for channel in kept:
        seen[1 + 16 * channel : 17 + 16 * channel] = True
    bias = torch.where(seen, 0.0, -torch.inf).expand(1, 1, 49, 49)
    with torch.no_grad():
        x = model.embed(images)
        for block in model.blocks:
            x = block(x, attn_mask=bias)
        masked = model.forward_head(model.norm(x))
        subset = model(images[:, kept], torch.tensor(kept))
    torch.testing.assert_close(subset, masked, rtol=1e-4, atol=1e-5)


def test_one_channel_without_an_embedding_is_a_plain_vit() -> None:
    model = small(in_chans=1)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1,
                              embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()  # fmt: skip
    state = model.state_dict()
    state.pop("patch_embed.channel_embed.weight")
    plain.load_state_dict(state)
    with torch.no_grad():
        model.patch_embed.channel_embed.weight.zero_()
        images = torch.rand(2, 1, 16, 16)
        torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-5)


def test_fewer_channels_without_their_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="images of 2 channels for a model of 3"):
        small()(torch.rand(1, 2, 16, 16))


# --- hierarchical channel sampling -----------------------------------------------


def test_every_count_is_as_likely_as_any_other() -> None:
    generator, total, draws = np.random.default_rng(0), 4, 4000
    drawn = [draw_channels(total, generator) for _ in range(draws)]
    counts = Counter(len(channels) for channels in drawn)
    kept = Counter(channel for channels in drawn for channel in channels)
    for size in range(1, total + 1):  # 1 / C each; four standard deviations are 0.027
        assert counts[size] / draws == pytest.approx(1 / total, abs=0.03)
    for channel in range(total):  # (C + 1) / 2C
        assert kept[channel] / draws == pytest.approx((total + 1) / (2 * total), abs=0.035)
    assert all(len(set(channels)) == len(channels) for channels in drawn)


def test_training_draws_once_a_batch_and_evaluation_never() -> None:
    method = build("channelvit")
    assert isinstance(method, ChannelVitClassifier)
    images = smoke_batch("channelvit")["image"]
    drawn = [method.channels_of(images, context(step)) for step in range(30)]
    assert {len(channels) for channels in drawn} == {1, 2, 3}
    assert drawn[7] == method.channels_of(images, context(7))
    for still in (build("channelvit").eval(), method_of(config("channelvit").encoder,
                  hierarchical_sampling=False)):  # fmt: skip
        assert isinstance(still, ChannelVitClassifier)
        for step in range(5):
            assert still.channels_of(images, context(step)) == [0, 1, 2]


def test_a_step_trains_on_the_drawn_channels_alone() -> None:
    method, batch = build("channelvit"), smoke_batch("channelvit")
    assert isinstance(method, ChannelVitClassifier)
    lengths: list[int] = []
    model = method.encoder.backbone
    model.blocks[0].register_forward_pre_hook(  # type: ignore[union-attr, index]
        lambda _module, args: lengths.append(args[0].shape[1])
    )
    for step in range(15):
        out = method.step(batch, context(step))
        channels = method.channels_of(batch["image"], context(step))
        assert lengths[-1] == 1 + 16 * len(channels)
        assert out.metrics["channels"] == len(channels)
        logits = method.subset_logits(batch["image"], channels)
        torch.testing.assert_close(out.losses["class"], cross_entropy(logits, batch["label"]))
    assert len(set(lengths)) == 3


def test_processes_draw_for_themselves() -> None:
    method, images = build("channelvit"), smoke_batch("channelvit")["image"]
    assert isinstance(method, ChannelVitClassifier)

    def on(offset: int) -> list[list[int]]:
        contexts = [StepContext(step=s, total_steps=9, steps_per_epoch=9, seed=0,
                                sample_offset=offset) for s in range(9)]  # fmt: skip
        return [method.channels_of(images, ctx) for ctx in contexts]

    assert on(0) != on(8)


def test_a_plain_vit_is_the_baseline_that_zeroes_and_rescales() -> None:
    method = method_of(config("supervised").encoder).eval()
    images = torch.rand(2, 3, 32, 32)
    encoder = method.encoder
    with torch.no_grad():
        x = encoder.normalise(images)
        x[:, 1] = 0.0
        x[:, [0, 2]] *= 3 / 2
        expected = encoder.classify(encoder(x, normalised=True))
        found = method.subset_logits(images, [2, 0])
        torch.testing.assert_close(found, expected)
        whole = method.subset_logits(images, range(3))
        torch.testing.assert_close(whole, method.class_logits(images))


def test_the_export_classifies_with_any_channels() -> None:
    method = build("channelvit").eval()
    subsets = next(part for part in method.exports() if isinstance(part, ChannelSubsets))
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        for channels in ([0], [1, 2], [0, 1, 2]):
            hidden = images.clone()
            hidden[:, [c for c in ALL if c not in channels]] = 0.5
            logits = subsets.subset_logits(images, channels)
            assert logits.shape == (2, NUM_CLASSES)
            assert torch.equal(logits, subsets.subset_logits(hidden, channels))
        assert torch.equal(logits, method.class_logits(images))  # type: ignore[operator]


def test_a_dry_run_counts_all_channels() -> None:
    found = measure(config("channelvit", "paper"))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
        timm.create_model("channelvit_small_patch16_224")(torch.empty(1, 3, 224, 224))
    assert found.gmacs == pytest.approx(flops.get_total_flops() / 2e9, rel=1e-3)
    assert set(found.tokens["encoder.model.blocks"]) == {589}


def test_tables_and_class_token_are_decayed_as_in_the_released_code() -> None:
    decay, _ = build("channelvit").param_groups()
    names = {name.split(".", 2)[2] for name, _ in decay.params}
    assert {"pos_embed", "cls_token", "patch_embed.channel_embed.weight"} <= names


@pytest.mark.parametrize("encoder", ["channelvit_small_patch16_224", "vit_small_patch16_224"])
def test_the_classifier_s_bias_tables_and_class_token_are_decayed(encoder: str) -> None:
    sizes = EncoderConfig(name=encoder, image_size=16, patch_size=8, dim=24, depth=2, heads=3)
    method = method_of(sizes)
    decay, no_decay = method.param_groups()
    assert no_decay.weight_decay == 0.0
    decayed = {name.split(".", 2)[2] for name, _ in decay.params}
    assert {"head.bias", "head.weight", "cls_token", "pos_embed"} <= decayed
    assert ("patch_embed.channel_embed.weight" in decayed) == encoder.startswith("channelvit")
    assert all(param.ndim == 1 for _, param in no_decay.params)
    assert {"blocks.0.norm1.weight", "patch_embed.proj.bias"} <= {
        name.split(".", 2)[2] for name, _ in no_decay.params
    }
