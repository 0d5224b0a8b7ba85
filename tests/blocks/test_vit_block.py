"""The block runner: timm's own numbers without a hook's doing, and what hooks may do."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from tests.encoders.test_timm_vit import VARIANTS, images_for, make
from vlx.blocks.vit_block import (
    BlockHook,
    LayerTokens,
    Signal,
    Signals,
    TokenReducer,
    UnsupportedBlock,
    attend,
    check_blocks,
    cross_block,
    run_blocks,
)
from vlx.core.errors import VlxError
from vlx.ops.token_state import TokenState, scatter_back, start


class Everything(BlockHook):
    """Asks for all signals and changes nothing."""

    def __init__(self, want: Signal = Signal.CLS_ATTN | Signal.KEYS) -> None:
        self.want = want
        self.seen: list[Signals] = []

    def signals(self, layer: int) -> Signal:
        return self.want

    def after_attention(self, state: TokenState, layer: int, signals: Signals) -> TokenState:
        self.seen.append(signals)
        return state


PARALLEL = "vit_small_patch16_18x2_224"
WITHOUT_CLASS = "vit_medium_patch16_gap_256"  # see below


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in (PARALLEL, WITHOUT_CLASS)])
def test_a_hook_that_does_nothing_leaves_every_bit(name: str) -> None:
    encoder = make(name)
    images = images_for(encoder)
    with torch.no_grad():
        plain, hooked = encoder(images), encoder(images, hook=BlockHook())
        watched = encoder(images, hook=Everything())
    assert torch.equal(hooked.tokens, plain.tokens)
    assert torch.equal(hooked.prefix, plain.prefix)
    assert torch.equal(watched.tokens, plain.tokens)


@pytest.mark.parametrize("name", VARIANTS)
def test_classify_equals_timms_forward(name: str) -> None:
    from vlx.encoders.config import EncoderConfig
    from vlx.encoders.timm_vit import TimmVit

    patch = 14 if "patch14" in name else 16
    cfg = EncoderConfig(name=name, image_size=4 * patch, patch_size=patch, dim=48, depth=2, heads=3)
    encoder = TimmVit(cfg, num_classes=7).eval()
    images = images_for(encoder)
    with torch.no_grad():
        theirs = encoder.vit(encoder.normalise(images))
        assert torch.equal(encoder.classify(encoder(images)), theirs)
        if name == PARALLEL:  # no block for hooks
            with pytest.raises(UnsupportedBlock, match="ParallelThingsBlock"):
                encoder.check_hooks()
            return
        assert torch.equal(encoder.classify(encoder(images, hook=BlockHook())), theirs)


def test_the_class_row_is_that_of_the_whole_map() -> None:
    encoder = make("vit_tiny_patch16_224")
    row, whole = Everything(Signal.CLS_ATTN), Everything(Signal.ATTN)
    with torch.no_grad():
        encoder(images_for(encoder), hook=row)
        encoder(images_for(encoder), hook=whole)
    for a, b in zip(row.seen, whole.seen):
        assert a.cls_attn is not None
        assert b.attn is not None
        torch.testing.assert_close(a.cls_attn, b.attn[:, :, 0])
        torch.testing.assert_close(a.cls_attn.sum(-1), torch.ones(2, 3))


def test_attention_with_a_context_is_the_joint_one_when_the_context_is_itself() -> None:
    block = timm.create_model("vit_tiny_patch16_224", depth=1).blocks[0].eval()
    x = torch.randn(2, 5, 192)
    with torch.no_grad():
        own, _ = attend(block.attn, x)
        given, _ = attend(block.attn, x, context=x)
        torch.testing.assert_close(own, given)
        torch.testing.assert_close(own, block.attn(x))
        torch.testing.assert_close(cross_block(block, x, x), block(x))
        # Queries are independent of each other: fewer of them change nothing for the rest.
        torch.testing.assert_close(cross_block(block, x[:, :2], x), block(x)[:, :2])


def test_a_bias_is_added_to_the_logits() -> None:
    block = timm.create_model("vit_tiny_patch16_224", depth=1).blocks[0].eval()
    x = torch.randn(1, 4, 192)
    # A key that counts twice equals the same key twice in the sequence.
    bias = torch.tensor([1.0, 1.0, 1.0, 2.0]).log()[None, None, None]
    with torch.no_grad():
        once, _ = attend(block.attn, x, bias=bias)
        twice, _ = attend(block.attn, torch.cat([x, x[:, 3:]], 1))
    torch.testing.assert_close(once, twice[:, :4])


class DropLast(TokenReducer):
    """Drops the last patch in layer 0, and plans `planned` tokens."""

    def __init__(self, planned: int) -> None:
        super().__init__()
        self.planned = planned

    def after_attention(self, state: TokenState, layer: int, signals: Signals) -> TokenState:
        if layer:
            return state
        keep = torch.arange(state.x.shape[1] - 1).expand(len(state.x), -1)
        return state.select(keep)

    def plan(self, num_patches: int, num_prefix: int, depth: int) -> list[LayerTokens]:
        whole = num_patches + num_prefix
        return [LayerTokens(whole, self.planned)] + [LayerTokens(self.planned, self.planned)] * (
            depth - 1
        )


def test_a_reducer_that_breaks_its_plan_fails_loudly() -> None:
    encoder = make("vit_tiny_patch16_224")
    out = encoder(images_for(encoder), hook=DropLast(16))
    assert out.tokens.shape[1] == 15
    with pytest.raises(VlxError, match="layer 0: ran on 17 tokens in attention and 16 in the MLP"):
        encoder(images_for(encoder), hook=DropLast(17))


def test_owners_follow_selected_tokens_back_to_the_grid() -> None:
    x = torch.randn(2, 5, 3)
    state = start(x, num_prefix=1)
    assert torch.equal(scatter_back(state.x, state.owner), x[:, 1:])
    index = torch.tensor([[0, 4, 2], [0, 1, 3]])
    left = state.select(index)
    assert left.owner.tolist() == [[-1, 2, -1, 1], [1, -1, 2, -1]]
    dense = scatter_back(left.x, left.owner)
    assert torch.equal(dense[0, 1], x[0, 2])
    assert torch.equal(dense[0, 0], torch.zeros(3))
    again = left.select(torch.tensor([[0, 2], [0, 1]]))
    assert again.owner.tolist() == [[-1, 1, -1, -1], [1, -1, -1, -1]]
    assert torch.equal(again.kept, again.owner >= 0)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "mixer_s32_224"])
def test_other_models_are_refused_by_name(name: str) -> None:
    model = timm.create_model(name)
    with pytest.raises(UnsupportedBlock, match=name):
        check_blocks(model.blocks, name)


@pytest.mark.parametrize("depth", [2])
def test_layer_outputs_are_those_of_timm(depth: int) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=depth).eval()
    x: Tensor = torch.randn(1, 6, 192)
    with torch.no_grad():
        _, taps = run_blocks(model.blocks, start(x, 1), BlockHook(), layers=(1, 2))
        first = model.blocks[0](x)
        assert torch.equal(taps[1], first)
        assert torch.equal(taps[2], model.blocks[1](first))
