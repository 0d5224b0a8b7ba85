"""ToMe: the card's checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.contract.build import assert_compiles_whole, config
from tests.encoders.test_timm_vit import make
from vlx.blocks.vit_block import attend
from vlx.commands.dry_run import measure
from vlx.core.errors import ConfigError
from vlx.encoders.timm_vit import TimmVit
from vlx.methods.tome import (
    REDUCERS,
    MergeSchedule,
    Merging,
    Pairing,
    TomeConfig,
    merges_by_layer,
)
from vlx.ops.token_merging import bipartite_matching, merge_pairs
from vlx.ops.token_state import TokenState, scatter_back, start

SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def cost(size: str, r: int, image_size: int = 224, patch: int = 16, sizes=SIZES) -> float:
    cfg = config("tome", "paper")
    dim, depth, heads = sizes[size]
    encoder = replace(
        cfg.encoder,
        name="deit_small_patch16_224",
        dim=dim,
        depth=depth,
        heads=heads,
        image_size=image_size,
        patch_size=patch,
    )
    found = measure(replace(cfg, encoder=encoder, method=TomeConfig(r=r))).reduced_gmacs
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("size", "r", "gmacs"),
    [
        ("tiny", 13, 0.731),
        ("tiny", 0, 1.254),
        ("small", 13, 2.703),
        ("small", 8, 3.416),
        ("small", 16, 2.291),
        ("base", 13, 10.367),
        ("base", 16, 8.772),
        ("large", 8, 30.96),
        ("large", 7, 34.71),
    ],
)
def test_gmacs_are_the_cards(size: str, r: int, gmacs: float) -> None:
    # The card leaves out the matching, at most N*N/4 products of a head's width a layer: 0.4 %.
    assert cost(size, r) == pytest.approx(gmacs, rel=5e-3)


def test_gmacs_at_larger_images() -> None:
    assert cost("large", 23, image_size=384) == pytest.approx(96.24, rel=5e-3)
    huge = {"huge": (1280, 32, 16)}
    assert cost("huge", 7, patch=14, sizes=huge) == pytest.approx(92.84, rel=5e-3)


def after_each_layer(r: int, patches: int, depth: int, prefix: int = 1) -> list[int]:
    plan = Merging([r] * depth, True).plan(patches, prefix, depth)
    return [tokens.mlp for tokens in plan]


def test_tokens_by_layer_are_the_cards() -> None:
    assert after_each_layer(13, 196, 12) == list(range(184, 40, -13))
    assert after_each_layer(16, 196, 12) == [*range(181, 20, -16), 11]
    assert after_each_layer(8, 196, 24) == [*range(189, 20, -8), 13, 7]
    assert after_each_layer(7, 256, 32) == list(range(250, 32, -7))


def test_schedules_merge_the_same_total() -> None:
    assert merges_by_layer(13, MergeSchedule.constant, 12) == [13] * 12
    falling = merges_by_layer(13, MergeSchedule.decreasing, 12)
    assert falling[0] == 26
    assert falling[-1] == 0
    assert falling == sorted(falling, reverse=True)
    assert abs(sum(falling) - 12 * 13) <= 12  # each layer rounds down


def merged(x: Tensor, r: int, prefix: int = 1) -> TokenState:
    state = start(x, prefix)
    return merge_pairs(state, *bipartite_matching(x, prefix), r)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_a_merge_conserves_the_size_weighted_mean_and_the_prefix(prefix: int) -> None:
    x = torch.randn(3, 21, 8)
    state = merged(x, 6, prefix)
    assert state.size is not None
    assert state.x.shape == (3, 15, 8)
    assert torch.equal(state.size.sum(1), torch.full((3,), 21.0))
    weighted = (state.x * state.size.unsqueeze(-1)).sum(1) / 21
    torch.testing.assert_close(weighted, x.mean(1))
    torch.testing.assert_close(state.x[:, :prefix], x[:, :prefix])
    assert (state.size[:, :prefix] == 1).all()
    # Every patch has one owner, and a token's size is the number of its patches.
    again = merge_pairs(state, *bipartite_matching(state.x, prefix), 4)
    for now in (state, again):
        counted = torch.zeros_like(now.size).scatter_add_(  # type: ignore[arg-type]
            1, now.owner, torch.ones_like(now.owner, dtype=torch.float32)
        )
        assert torch.equal(counted[:, prefix:], now.size[:, prefix:])  # type: ignore[index]


def test_merging_equals_a_naive_loop() -> None:
    x = torch.randn(1, 12, 4)
    state = merged(x, 3)
    unit = torch.nn.functional.normalize(x[0], dim=-1)
    pairs = []
    for a in range(2, 12, 2):  # the class token, 0, is not merged
        similarity = {b: float(unit[a] @ unit[b]) for b in range(1, 12, 2)}
        b = max(similarity, key=lambda place: similarity[place])
        pairs.append((similarity[b], a, b))
    sources = {a: b for _, a, b in sorted(pairs, reverse=True)[:3]}
    tokens = [[i] for i in range(0, 12, 2) if i not in sources]
    tokens += [[b, *(a for a in sources if sources[a] == b)] for b in range(1, 12, 2)]
    expected = torch.stack([x[0, members].mean(0) for members in tokens])
    torch.testing.assert_close(state.x[0], expected)
    for place, members in enumerate(tokens):
        assert all(state.owner[0, m - 1] == place for m in members if m > 0)


def test_identical_neighbours_merge_and_come_back_exactly() -> None:
    pairs = torch.randn(2, 8, 6)
    x = pairs.repeat_interleave(2, dim=1)
    state = merged(x, 5, prefix=0)
    torch.testing.assert_close(scatter_back(state.x, state.owner), x)


def test_a_token_of_size_k_equals_k_copies_in_attention() -> None:
    encoder = make("vit_tiny_patch16_224")
    attn = encoder.vit.blocks[0].attn
    x = torch.randn(2, 6, 48)
    size = torch.tensor([[1.0, 1, 3, 1, 2, 1]] * 2)
    state = TokenState(x, 1, owner=torch.zeros(2, 5, dtype=torch.int64), size=size)
    bias = Merging([0], True).attention_bias(state, 0)
    with torch.no_grad():
        out, _ = attend(attn, x, bias=bias)  # type: ignore[arg-type]
        copies, _ = attend(attn, x[:, [0, 1, 2, 2, 2, 3, 4, 4, 5]])  # type: ignore[arg-type]
    torch.testing.assert_close(out, copies[:, [0, 1, 2, 5, 6, 8]], rtol=1e-4, atol=1e-5)


def test_r_zero_is_the_plain_vit_to_the_bit() -> None:
    encoder = make("vit_small_patch14_reg4_dinov2")
    images = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        hooked = encoder(images, hook=Merging([0, 0], True))
        assert torch.equal(hooked.tokens, encoder(images).tokens)


def test_mean_pooling_counts_patches_not_tokens() -> None:
    """With identical neighbours everything merged away is a copy, so the logits stay."""
    cfg = replace(
        config("tome").encoder, name="vit_base_patch16_224", image_size=16, patch_size=2, dim=24
    )
    torch.manual_seed(0)
    encoder = TimmVit(replace(cfg, depth=1, heads=3), num_classes=5).eval()
    encoder.vit.global_pool = "avg"
    x = torch.randn(2, 65, 24)
    x[:, 2::2] = x[:, 1:-1:2]
    state = merged(x, 20)
    from vlx.encoders.base import EncoderOut

    plain = encoder.classify(EncoderOut(x[:, 1:], x[:, :1]))
    reduced = encoder.classify(EncoderOut(state.x[:, 1:], state.x[:, :1], state=state))
    torch.testing.assert_close(plain, reduced)


def test_gradient_reaches_the_tokens_that_were_merged_away() -> None:
    x = torch.randn(1, 9, 4, requires_grad=True)
    merged(x, 3).x.square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(-1) > 0).all()


def test_no_graph_breaks_under_compile() -> None:
    assert_compiles_whole("tome")


def test_negative_r_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.r=-1"):
        TomeConfig(r=-1)


@pytest.mark.parametrize("pairing", list(Pairing))
def test_baselines_run_on_the_same_counts(pairing: Pairing) -> None:
    encoder = make("vit_tiny_patch16_224")
    hook = REDUCERS[pairing]([3, 2], True)
    out = encoder(torch.rand(2, 3, 64, 64), hook=hook)  # the runner checks the plan
    assert out.tokens.shape[1] == 11
    assert out.state is not None
    held = (out.state.owner >= 0).all(1)
    assert held.all() == (pairing is not Pairing.drop)
    if pairing is Pairing.drop:
        assert ((out.state.owner >= 0).sum(1) == 11).all()
