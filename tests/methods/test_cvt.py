"""CvT: the card's checks, and equality with transformers' port."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CvtConfig as PortConfig
from transformers import CvtForImageClassification

from tests.contract.build import NUM_CLASSES, build, config
from vlx.core.errors import ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.methods.cvt import ConvAttention, Cvt, CvtBlock, CvtClassifier, CvtConfig

# name -> parameters (card), millions and {size: GMACs} of the paper's tables 3 and 4.
PUBLISHED = {
    "cvt_13": (19_997_480, 20, {224: 4.5, 384: 16.3}),
    "cvt_21": (31_622_696, 32, {224: 7.1, 384: 24.9}),
    "cvt_w24": (277_196_392, 277, {384: 193.2}),
}
SMALL = {"embed_dims": (16, 32, 64), "depths": (1, 1, 2), "num_heads": (1, 2, 4)}


def small(**more) -> Cvt:
    """The card's tiny variant with random weights and statistics everywhere."""
    torch.manual_seed(0)
    model = Cvt(**{**SMALL, "num_classes": 10, **more})
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.05, 0.6) if value.ndim == 1 else value.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_gmacs_are_the_papers(name: str) -> None:
    params, millions, costs = PUBLISHED[name]
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name).eval()
        assert sum(p.numel() for p in model.parameters()) == params
        assert round(params / 1e6) == millions
        for size, gmacs in costs.items():
            with FlopCounterMode(display=False) as flops:
                model(torch.empty(1, 3, size, size))
            assert flops.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.02)


def test_parameters_with_ten_classes_and_of_the_tiny_variant() -> None:
    with torch.device("meta"):
        ten = timm.create_model("cvt_13", num_classes=10)
        tiny = Cvt(**SMALL, num_classes=10)
    assert sum(p.numel() for p in ten.parameters()) == 19_616_330
    assert sum(p.numel() for p in tiny.parameters()) == 148_330


def lengths(model: Cvt, size: int) -> list[tuple[int, int, int]]:
    """Tokens of queries, keys and values in the first block of every stage."""
    found: list[tuple[int, int, int]] = []
    for stage in model.stages:
        attn = stage.blocks[0].attn
        row: list[int] = []
        for linear in (attn.q, attn.k, attn.v):
            linear.register_forward_hook(
                lambda _module, args, _out, row=row: row.append(args[0].shape[1])
            )
        attn.register_forward_hook(lambda *_, row=row: found.append(tuple(row)))
    with torch.no_grad():
        model(torch.empty(1, 3, size, size))
    return found


def test_tokens_at_224_are_the_cards_and_kv_stride_one_keeps_them_all() -> None:
    with torch.device("meta"):
        usual = lengths(timm.create_model("cvt_13").eval(), 224)
        assert usual == [(3136, 784, 784), (784, 196, 196), (197, 50, 50)]
        plain = lengths(timm.create_model("cvt_13", kv_stride=1).eval(), 224)
        assert plain == [(n, n, n) for n in (3136, 784, 197)]


# --- transformers' port ------------------------------------------------------------------------


def to_port(name: str) -> str:
    """Our name of a weight as transformers'."""
    fixed = {"norm": "layernorm", "head": "classifier"}
    part, kind = name.rsplit(".", 1)
    if part in fixed:
        return f"{fixed[part]}.{kind}"
    if name.endswith("cls_token"):
        return f"cvt.encoder.{name}"
    inner = {
        r"embed\.proj": "embedding.convolution_embeddings.projection",
        r"embed\.norm": "embedding.convolution_embeddings.normalization",
        r"blocks\.(\d+)\.norm1": r"layers.\1.layernorm_before",
        r"blocks\.(\d+)\.norm2": r"layers.\1.layernorm_after",
        r"blocks\.(\d+)\.mlp\.fc1": r"layers.\1.intermediate.dense",
        r"blocks\.(\d+)\.mlp\.fc2": r"layers.\1.output.dense",
        r"blocks\.(\d+)\.attn\.proj": r"layers.\1.attention.output.dense",
    }
    words = {"q": "query", "k": "key", "v": "value"}
    for letter, word in words.items():
        attention = r"layers.\1.attention.attention."
        inner[rf"blocks\.(\d+)\.attn\.{letter}"] = f"{attention}projection_{word}"
        convolved = f"{attention}convolution_projection_{word}.convolution_projection."
        inner[rf"blocks\.(\d+)\.attn\.conv_{letter}\.0"] = f"{convolved}convolution"
        inner[rf"blocks\.(\d+)\.attn\.conv_{letter}\.1"] = f"{convolved}normalization"
    stage, rest = re.fullmatch(r"stages\.(\d+)\.(.+)", part).groups()  # type: ignore[union-attr]
    for pattern, target in inner.items():
        match = re.fullmatch(pattern, rest)
        if match:
            return f"cvt.encoder.stages.{stage}.{match.expand(target)}.{kind}"
    raise AssertionError(name)


@pytest.mark.parametrize("kv_stride", [2, 1])
def test_forward_equals_transformers_with_the_same_weights(kv_stride: int) -> None:
    depths = [1, 2, 3]  # the port needs stage i to be deeper than i
    ours = small(depths=depths, act_layer=nn.GELU, kv_stride=kv_stride)  # the port's activation
    theirs = CvtForImageClassification(
        PortConfig(
            embed_dim=[16, 32, 64],
            depth=depths,
            num_heads=[1, 2, 4],
            stride_kv=[kv_stride] * 3,
            num_labels=10,
        )
    ).eval()
    theirs.load_state_dict({to_port(name): value for name, value in ours.state_dict().items()})
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_cvt_13_equals_transformers_own_cvt_13() -> None:
    ours = timm.create_model("cvt_13", act_layer=nn.GELU).eval()
    theirs = CvtForImageClassification(PortConfig(num_labels=1000)).eval()
    theirs.load_state_dict({to_port(name): value for name, value in ours.state_dict().items()})
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-5, atol=1e-5)


# --- mechanism -----------------------------------------------------------------------------------


def test_logits_are_scaled_by_the_width_of_the_stage() -> None:
    torch.manual_seed(0)
    attn = ConvAttention(24, 3, kv_stride=2).eval()
    x = torch.randn(2, 1 + 20, 24)  # a class token and a 4x5 map
    grid = x[:, 1:].transpose(1, 2).reshape(2, 24, 4, 5)

    def heads(conv: nn.Module, linear: nn.Module) -> Tensor:
        tokens = torch.cat([x[:, :1], conv(grid).flatten(2).transpose(1, 2)], 1)
        return linear(tokens).reshape(2, -1, 3, 8).transpose(1, 2)

    with torch.no_grad():
        q, k, v = (heads(getattr(attn, f"conv_{n}"), getattr(attn, n)) for n in "qkv")
        weights = (q @ k.transpose(2, 3) / 24**0.5).softmax(-1)  # not 8 ** 0.5
        expected = attn.proj((weights @ v).transpose(1, 2).reshape(2, 21, 24))
        torch.testing.assert_close(attn(x, (4, 5)), expected)
    assert k.shape[2] == 1 + 2 * 3


def test_the_class_token_skips_the_convolutions() -> None:
    attn = ConvAttention(8, 2, kv_stride=2).eval()
    x = torch.randn(1, 1 + 16, 8)
    moved = torch.cat([x[:, :1] + 1.0, x[:, 1:]], 1)
    seen: list[Tensor] = []
    attn.conv_q.register_forward_hook(lambda _module, args, _out: seen.append(args[0]))
    with torch.no_grad():
        first, second = attn(x, (4, 4)), attn(moved, (4, 4))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(first, second)


def test_there_is_no_position_and_any_size_runs_with_the_same_weights() -> None:
    model = small()
    assert not any("pos" in name for name in model.state_dict())
    with torch.no_grad():
        for size in (32, 64, 96):
            assert model(torch.rand(1, 3, size, size)).shape == (1, 10)
        assert model(torch.rand(1, 3, 64, 48)).shape == (1, 10)


def test_a_batch_of_one_gives_the_logits_of_a_batch_of_eight() -> None:
    model = small()
    images = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images[:1]), model(images)[:1], rtol=1e-4, atol=1e-5)


def test_drop_path_rises_over_the_last_stage_alone() -> None:
    model = Cvt(**{**SMALL, "depths": (1, 2, 5)}, drop_path_rate=0.2)
    rates = [
        [block.drop_path.drop_prob for block in stage.blocks if isinstance(block, CvtBlock)]
        for stage in model.stages
    ]
    assert rates[:2] == [[0.0], [0.0, 0.0]]
    assert rates[2] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_biases_norms_and_the_class_token_are_not_decayed() -> None:
    decay, no_decay = build("cvt").param_groups()
    assert no_decay.weight_decay == 0.0
    kept = {name for name, _ in no_decay.params}
    assert "encoder.model.stages.2.cls_token" in kept
    for name, param in decay.params:
        assert param.ndim > 1, name
        assert "norm" not in name
        assert name not in kept


def test_the_config_sets_the_stages() -> None:
    cfg = config("cvt").method
    encoder = build("cvt").encoder.backbone
    assert [info["num_chs"] for info in encoder.feature_info] == cfg.stage_dims
    assert [info["reduction"] for info in encoder.feature_info] == [1, 2, 4]


# --- mistakes ------------------------------------------------------------------------------------


def test_stages_of_unequal_number_are_refused() -> None:
    builder = EncoderBuilder({"encoder": config("cvt").encoder}, NUM_CLASSES, load_weights=False)
    method = replace(config("cvt").method, stage_dims=[8, 16])
    with pytest.raises(ConfigError, match=r"CvT needs as many .* 2 dims, 3 depths, 3 heads"):
        CvtClassifier(method, builder)


def test_another_kind_of_encoder_is_refused_by_name() -> None:
    builder = EncoderBuilder({"encoder": config("supervised").encoder}, NUM_CLASSES)
    with pytest.raises(ConfigError, match=r"VisionTransformer; this method trains cvt_13"):
        CvtClassifier(CvtConfig(), builder)


def test_a_stride_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_stride=0 must be 1 or more"):
        CvtConfig(kv_stride=0)
