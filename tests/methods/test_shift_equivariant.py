"""Polyphase anchoring in whole models: the card's checks."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.contract.build import build, config
from vlx.core.errors import ConfigError
from vlx.methods.shift_equivariant import AnchoredBlock, CircularConv, PolyTwins, PolyVit

PARAMS = {
    "poly_vit_small_patch16_224": 21_979_624,
    "poly_vit_base_patch16_224": 86_425_576,
    "poly_twins_svt_small": 24_060_776,
    "poly_twins_svt_base": 56_070_952,
}
SHIFTS = [(1, 0), (3, 2), (5, 3), (0, 7), (13, 14)]


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_the_cards(name: str) -> None:
    build("shift-equivariant")  # registers the models
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


def stirred(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param, std=0.1 if param.ndim > 1 else 0.3)
    return model.double().eval()


def vit(**more) -> PolyVit:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return PolyVit(num_classes=5, **{**sizes, **more})


def twins(cls: type = PolyTwins) -> nn.Module:
    """Two stages of windows and of keys at a stride: maps of 14x14 and 7x7."""
    return cls(
        img_size=56, num_classes=5, embed_dims=(12, 24), num_heads=(2, 3), depths=(2, 2),
        mlp_ratios=(2, 2), wss=(7, 7), sr_ratios=(2, 1),
    )  # fmt: skip


def difference(model: nn.Module, side: int, shift: tuple[int, int]) -> float:
    x = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        return float((model(x) - model(x.roll(shift, (2, 3)))).abs().max())


@pytest.mark.parametrize("shift", SHIFTS)
def test_logits_do_not_change_under_circular_shifts(shift: tuple[int, int]) -> None:
    assert difference(stirred(vit()), 32, shift) < 1e-10
    assert difference(stirred(twins()), 56, shift) < 1e-10


def test_the_plain_models_change() -> None:
    plain = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    assert difference(stirred(plain), 32, (5, 3)) > 1e-3
    assert difference(stirred(twins(timm.models.twins.Twins)), 56, (5, 3)) > 1e-3


def test_each_part_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's four-way test."""

    class ZeroPadded(CircularConv):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.padding_mode = "zeros"

    whole = difference(stirred(vit()), 32, (5, 3))
    table = stirred(vit())
    table.pos_embed = nn.Parameter(torch.randn(1, 65, 24).double())
    monkeypatch.setattr("vlx.methods.shift_equivariant.CircularConv", ZeroPadded)
    padded = difference(stirred(vit()), 32, (5, 3))
    monkeypatch.setattr("vlx.methods.shift_equivariant.polyphase_anchor", lambda x, stride: x)
    bare = difference(stirred(vit()), 32, (5, 3))
    assert whole < 1e-10
    assert min(padded, bare, difference(table, 32, (5, 3))) > 1e-4


def test_twins_blocks_are_anchored_to_their_windows_and_strides() -> None:
    model = twins()
    anchors = [[block.anchor for block in stage] for stage in model.blocks]
    assert anchors == [[7, 2], [7, 1]]
    assert all(isinstance(block, AnchoredBlock) for stage in model.blocks for block in stage)
    assert all(block.proj[0].padding_mode == "circular" for block in model.pos_block)


def test_without_anchors_and_circular_padding_it_is_timm_s_twins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlx.methods.shift_equivariant.polyphase_anchor", lambda x, stride: x)
    ours, theirs = twins(), twins(timm.models.twins.Twins)
    theirs.load_state_dict(ours.state_dict())
    for block in ours.pos_block:
        block.proj[0].padding_mode = "zeros"
    x = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_the_class_token_and_twins_positions_are_not_decayed() -> None:
    method = build("shift-equivariant")
    decay, no_decay = method.param_groups()
    assert "encoder.model.cls_token" in dict(no_decay.params)
    assert "encoder.model.patch_embed.position.weight" in dict(decay.params)
    assert all(name.startswith("pos_block.") for name in twins().no_weight_decay())


def test_a_size_that_windows_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.image_size=30 is no multiple of"):
        vit(img_size=30)
    model = twins().eval()
    with pytest.raises(ConfigError, match="by 7 needs sides that it divides, got 16x16"):
        model(torch.rand(1, 3, 64, 64))


def test_the_released_length_and_rates() -> None:
    cfg = config("shift-equivariant", "paper")
    assert (cfg.train.epochs, cfg.train.batch_size, cfg.optim.clip_norm) == (300, 512, 5.0)
    assert cfg.optim.base_lr * cfg.train.batch_size / 256 == pytest.approx(5e-4)
    base = config("shift-equivariant", "polyvit-base")
    assert base.optim.base_lr * base.train.batch_size / 256 == pytest.approx(1e-3)


def predictions(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(1)


def test_float32_predictions_agree_for_every_shift_within_a_patch() -> None:
    model = stirred(vit()).float()
    x = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = predictions(model, x)
        for down in range(4):
            for right in range(4):
                assert torch.equal(predictions(model, x.roll((down, right), (2, 3))), expected)
