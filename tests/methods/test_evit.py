"""EViT: the card's checks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.contract.build import assert_compiles_whole, build, config, context
from tests.encoders.test_timm_vit import images_for, make
from vlx.blocks.vit_block import BlockHook, Signal, Signals
from vlx.commands.dry_run import measure
from vlx.core.errors import ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig
from vlx.methods.evit import Evit, EvitConfig, RandomDropping, Ranking, Reorganization
from vlx.ops.token_state import TokenState, start

FUSED = {0.9: (179, 163, 148), 0.8: (159, 129, 105), 0.7: (140, 100, 72), 0.6: (120, 74, 46),
         0.5: (100, 52, 28)}  # fmt: skip
DROPPED = {0.9: (178, 161, 145), 0.8: (158, 127, 102), 0.7: (139, 98, 69), 0.6: (119, 72, 44),
           0.5: (99, 50, 26)}  # fmt: skip
GMACS = {0.9: (4.022, 3.988), 0.8: (3.477, 3.444), 0.7: (3.029, 2.997), 0.6: (2.635, 2.608),
         0.5: (2.309, 2.282)}  # fmt: skip
BASE_GMACS = {0.9: 15.40, 0.8: 13.33, 0.7: 11.61, 0.6: 10.09, 0.5: 8.82}


@pytest.mark.parametrize(("fuse", "counts"), [(True, FUSED), (False, DROPPED)])
def test_tokens_by_layer_are_the_cards(fuse: bool, counts: dict) -> None:
    for keep_rate, (third, sixth, ninth) in counts.items():
        plan = Reorganization(keep_rate, [3, 6, 9], fuse).plan(196, 1, 12)
        expected = [197] * 3 + [third] * 3 + [sixth] * 3 + [ninth] * 3
        assert [tokens.mlp for tokens in plan] == expected
        assert [tokens.attention for tokens in plan] == [197, *expected[:-1]]


@pytest.mark.parametrize("keep_rate", GMACS)
def test_gmacs_are_the_cards(keep_rate: float) -> None:
    cfg = config("evit", "paper")
    for fuse, expected in zip((True, False), GMACS[keep_rate]):
        method = EvitConfig(keep_rate=keep_rate, fuse=fuse)
        found = measure(replace(cfg, method=method)).reduced_gmacs
        assert found == pytest.approx(expected, rel=2e-3)
    base = replace(cfg.encoder, name="deit_base_patch16_224", dim=768, heads=12)
    found = measure(replace(cfg, encoder=base, method=EvitConfig(keep_rate=keep_rate)))
    assert found.reduced_gmacs == pytest.approx(BASE_GMACS[keep_rate], rel=2e-3)


def test_keeping_all_is_the_plain_vit_to_the_bit_in_training_too() -> None:
    encoder = make("vit_tiny_patch16_224")
    images = images_for(encoder)
    for mode in (True, False):
        encoder.train(mode)
        kept = encoder(images, hook=Reorganization(1.0, [0, 1], True))
        assert torch.equal(kept.tokens, encoder(images).tokens)


def reduced(x: torch.Tensor, attention: torch.Tensor, rate: float, fuse: bool = True) -> TokenState:
    """One reduction of `x (B, N, D)`, one prefix token, under a given row (B, H, N)."""
    hook = Reorganization(rate, [0], fuse)
    return hook.after_attention(start(x, 1), 0, Signals(cls_attn=attention))


def test_kept_and_fused_equal_a_naive_loop() -> None:
    x, attention = torch.randn(2, 11, 4), torch.rand(2, 3, 11).softmax(-1)
    state = reduced(x, attention, 0.6)
    assert state.x.shape == (2, 1 + 6 + 1, 4)
    for sample in range(2):
        mean = attention[sample].mean(0)
        order = sorted(range(1, 11), key=lambda i: -float(mean[i]))
        expected = [x[sample, 0], *(x[sample, i] for i in order[:6])]
        extra = torch.zeros(4)
        for i in order[6:]:
            extra += mean[i] * x[sample, i]  # a sum with raw weights, not a mean
        torch.testing.assert_close(state.x[sample], torch.stack([*expected, extra]))
        for place, i in enumerate(order[:6], start=1):
            assert state.owner[sample, i - 1] == place
        assert {int(state.owner[sample, i - 1]) for i in order[6:]} == {7}
        assert state.kept[sample].tolist() == [i in order[:6] for i in range(1, 11)]
        assert float(mean[order].sum()) == pytest.approx(1 - float(mean[0]), abs=1e-5)


def test_dropping_leaves_patches_without_a_token() -> None:
    x, attention = torch.randn(1, 11, 4), torch.rand(1, 3, 11).softmax(-1)
    state = reduced(x, attention, 0.6, fuse=False)
    assert state.x.shape == (1, 7, 4)
    assert int((state.owner < 0).sum()) == 4


def test_gradient_flows_through_the_fused_tokens_attention() -> None:
    attention = torch.rand(1, 2, 9).softmax(-1).requires_grad_()
    reduced(torch.randn(1, 9, 4), attention, 0.5).x[:, -1].sum().backward()
    assert attention.grad is not None
    assert attention.grad.abs().sum() > 0


def test_patch_order_does_not_matter() -> None:
    encoder = make("vit_tiny_patch16_224")
    images, hook = images_for(encoder), Reorganization(0.5, [0, 1], True)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    with torch.no_grad():
        straight, mixed = encoder(images, hook=hook), encoder(images, keep=order, hook=hook)
    torch.testing.assert_close(straight.prefix, mixed.prefix, rtol=1e-4, atol=1e-5)


def test_the_same_tokens_are_kept_when_attention_is_eager() -> None:
    class Eager(BlockHook):
        """The reducer, its row taken from the whole map."""

        def __init__(self, hook: Reorganization) -> None:
            self.hook = hook
            self.states: list[TokenState] = []

        def signals(self, layer: int) -> Signal:
            return Signal.ATTN

        def after_attention(self, state: TokenState, layer: int, signals: Signals) -> TokenState:
            assert signals.attn is not None
            row = Signals(cls_attn=signals.attn[:, :, 0])
            self.states.append(self.hook.after_attention(state, layer, row))
            return self.states[-1]

    encoder = make("vit_tiny_patch16_224")
    hook = Reorganization(0.5, [0, 1], True)
    eager = Eager(hook)
    with torch.no_grad():
        fused_kernel = encoder(images_for(encoder), hook=hook)
        encoder(images_for(encoder), hook=eager)
    assert fused_kernel.state is not None
    assert torch.equal(fused_kernel.state.owner, eager.states[-1].owner)


def test_the_keep_rate_falls_along_a_cosine_and_a_step_sets_it() -> None:
    cfg = replace(config("evit").method, shrink_start_epoch=10.0, shrink_epochs=100.0)
    method = build("evit")
    assert isinstance(method, Evit)
    method.cfg = cfg
    assert method.keep_rate_at(0) == method.keep_rate_at(9.99) == 1.0
    assert method.keep_rate_at(60) == pytest.approx((1 + cfg.keep_rate) / 2)
    at_85 = cfg.keep_rate + (1 - cfg.keep_rate) * (1 + math.cos(0.75 * math.pi)) / 2
    assert method.keep_rate_at(85) == pytest.approx(at_85)
    assert method.keep_rate_at(110) == method.keep_rate_at(300) == cfg.keep_rate
    side = config("evit").encoder.image_size
    batch = {"image": torch.rand(4, 3, side, side), "label": torch.arange(4)}
    used = []
    logits = method.class_logits
    method.class_logits = lambda images: (used.append(method.reducer.keep_rate), logits(images))[1]
    method.step(batch, context(step=600))  # ten steps an epoch: epoch 60
    assert used == [pytest.approx((1 + cfg.keep_rate) / 2)]
    assert method.reducer.keep_rate == cfg.keep_rate  # what an evaluation measures


def test_no_graph_breaks_under_compile() -> None:
    assert_compiles_whole("evit")


@pytest.mark.parametrize("keep_rate", [0.0, -0.1, 1.01])
def test_a_keep_rate_outside_its_range_is_refused(keep_rate: float) -> None:
    with pytest.raises(ConfigError, match=r"method.keep_rate=.* must lie in"):
        EvitConfig(keep_rate=keep_rate)


def test_a_layer_past_the_depth_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"reduction_layers=\[1, 12\].*12 layers"):
        Reorganization(0.5, [1, 12], True).plan(196, 1, 12)
    with pytest.raises(ConfigError, match=r"reduction_layers=\[-1\]"):
        Reorganization(0.5, [-1], True).plan(196, 1, 12)


def test_the_default_layers_follow_the_depth() -> None:
    method = build("evit", "paper")
    assert method.reducer.layers == {3, 6, 9}


def test_the_random_baseline_keeps_as_many_in_their_order() -> None:
    x = torch.randn(2, 11, 4)
    state = RandomDropping(0.6, [0], True).after_attention(start(x, 1), 0, Signals())
    assert state.x.shape == (2, 7, 4)
    for sample in range(2):
        kept = [i for i in range(10) if state.owner[sample, i] >= 0]
        torch.testing.assert_close(state.x[sample, 1:], x[sample, 1:][kept])
    plan = RandomDropping(0.7, [3, 6, 9], True).plan(196, 1, 12)
    assert [plan[layer].mlp for layer in (3, 6, 9)] == list(DROPPED[0.7])


def test_a_register_is_no_class_token_to_rank_by() -> None:
    sizes = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 4, "heads": 3}
    cfg = EncoderConfig(name="vit_medium_patch16_reg4_gap_256", **sizes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ranks by the class token's attention"):
        Evit(EvitConfig(), EncoderBuilder({"encoder": cfg}, 5))
    Evit(EvitConfig(ranking=Ranking.random), EncoderBuilder({"encoder": cfg}, 5))
