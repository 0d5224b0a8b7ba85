"""ViR: three modes of one model, its decay, its sizes."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.contract.build import build, config
from vlx.commands.dry_run import measure
from vlx.core.errors import ConfigError
from vlx.methods.vir import (
    ClassPlace,
    Form,
    Mode,
    Retention,
    Vir,
    VirConfig,
    VisionRetention,
    decay_mask,
    head_decays,
    retain,
    retain_chunk,
    retain_token,
    softmax_of_decayed,
)

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def vir(**arguments: object) -> VisionRetention:
    """16 patches; weights away from their start, so that every part shows."""
    torch.manual_seed(0)
    model = VisionRetention(**SIZES, num_classes=5, **arguments)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.2 * torch.randn(param.shape, generator=generator)
    return model.double().eval()


def projections(count: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, count, 4, dtype=torch.float64) for _ in range(3))
    return q, k, v, head_decays(3).double()


# --- the formula ---------------------------------------------------------------------------------


def test_decays_of_six_heads_are_the_cards() -> None:
    expected = [0.96875, 0.98205, 0.98969, 0.99408, 0.99660, 0.99805]
    assert head_decays(6).tolist() == pytest.approx(expected, abs=5e-6)


def test_the_mask_holds_powers_of_the_distance_back_and_nothing_ahead() -> None:
    gamma = head_decays(2)
    mask = decay_mask(gamma, 300)
    for n, m in ((0, 0), (5, 2), (299, 0)):
        torch.testing.assert_close(mask[:, n, m], gamma ** (n - m))
    assert not mask.triu(1).any()
    assert mask.isfinite().all()


def test_retention_is_the_sum_over_the_past() -> None:
    q, k, v, gamma = projections()
    found = retain(q, k, v, gamma)
    for head in range(3):
        for n in range(7):
            expected = torch.zeros(2, 4, dtype=torch.float64)
            for m in range(n + 1):
                weight = (q[:, head, n] * k[:, head, m]).sum(-1, keepdim=True)
                expected += float(gamma[head]) ** (n - m) * weight * v[:, head, m]
            torch.testing.assert_close(found[:, head, n], expected)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_chunks_and_the_recurrence_give_the_parallel_result(size: int) -> None:
    q, k, v, gamma = projections()
    expected = retain(q, k, v, gamma)
    how = retain_token if size == 1 else retain_chunk
    state, outs = torch.zeros(2, 3, 4, 4, dtype=torch.float64), []
    for part in zip(*(x.split(size, dim=2) for x in (q, k, v))):
        out, state = how(*part, gamma, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), expected, rtol=1e-12, atol=1e-12)
    summed = sum(
        gamma[:, None, None] ** (6 - m) * k[:, :, m, :, None] * v[:, :, m, None, :]
        for m in range(7)
    )
    torch.testing.assert_close(state, summed, rtol=1e-12, atol=1e-12)


def test_without_memory_a_token_sees_itself_and_with_a_perfect_one_all_before_alike() -> None:
    q, k, v, _ = projections()
    alone = (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(retain(q, k, v, torch.zeros(3, dtype=torch.float64)), alone)
    linear = q[:, :, :, None] @ (k[..., None] * v[..., None, :]).cumsum(2)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(retain(q, k, v, ones), linear[:, :, :, 0])


def test_the_releases_softmax_gives_the_future_a_weight() -> None:
    q, k, v, gamma = projections()
    found = softmax_of_decayed(q, k, v, gamma)
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k)
    for n in range(7):
        for m in range(7):
            logits[:, :, n, m] *= gamma ** (n - m) if m <= n else 0.0
    torch.testing.assert_close(found, logits.softmax(-1) @ v)
    v[:, :, 6] += 1.0
    assert (softmax_of_decayed(q, k, v, gamma) != found)[:, :, 0].all()


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 5, 16, 17, 40])
def test_three_modes_of_one_model_give_equal_logits(chunk: int) -> None:
    parallel = vir()
    other = vir(mode=Mode.recurrent if chunk == 1 else Mode.chunkwise, chunk_size=chunk)
    other.load_state_dict(parallel.state_dict())
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(other(images), parallel(images), rtol=1e-10, atol=1e-10)


def test_a_patch_changes_nothing_before_it_and_the_class() -> None:
    model = vir()
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    changed = images.clone()
    changed[:, :, 4:8, 8:12] += 1.0  # patch 6
    with torch.no_grad():
        before, after = (model.forward_features(x)[0] for x in (images, changed))
    assert torch.equal(before[1:7], after[1:7])  # the class token comes first in what is given
    assert (before[7:] != after[7:]).all()
    assert (before[0] != after[0]).any()


def test_a_class_token_in_front_sees_no_image() -> None:
    model = vir(class_place=ClassPlace.first)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(logits, logits[:1].expand(3, -1))


def test_states_have_one_size_whatever_the_image() -> None:
    for size in (16, 32):
        model = VisionRetention(**{**SIZES, "img_size": size}, num_classes=5)
        states = model.states(model._pos_embed(model.patch_embed(torch.zeros(1, 3, size, size))))
        assert sum(state.numel() for state in states) == 2 * 3 * 8 * 8


def test_without_layer_scale_a_block_is_the_identity() -> None:
    model = vir()
    for block in model.blocks:
        nn.init.zeros_(block.ls1.gamma)
        nn.init.zeros_(block.ls2.gamma)
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    assert torch.equal(model.blocks(x), x)


def test_norm_and_gelu_stand_between_the_heads_and_the_projection() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 12)
    layer = Retention(12, 3, form=Form.retention, norm=True, gelu=True, class_last=False)
    heads = retain(*layer.project(x), layer.gamma).transpose(1, 2).flatten(2)
    normed = (heads - heads.mean(-1, keepdim=True)) / (
        heads.var(-1, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    torch.testing.assert_close(layer(x), layer.proj(nn.functional.gelu(normed)))
    bare = Retention(12, 3, form=Form.retention, norm=False, gelu=False, class_last=False)
    bare.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(bare(x), layer.proj(heads))


def test_decays_are_neither_trained_nor_saved() -> None:
    model = vir()
    assert not any("gamma" in name and "attn" in name for name in model.state_dict())
    assert model.blocks[0].attn.gamma.shape == (3,)


def test_the_start_is_the_releases() -> None:
    torch.manual_seed(0)
    model = VisionRetention(img_size=64, patch_size=4, embed_dim=96, depth=1, num_heads=3)
    assert model.cls_token is not None
    assert model.pos_embed is not None
    assert model.pos_embed.shape == (1, 256, 96)  # none for the class token
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.cls_token.abs().max() < 1e-5
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert (model.blocks[0].ls1.gamma == 1e-5).all()


@pytest.mark.parametrize(
    ("name", "params", "norms"),
    [("vir_small_patch16_224", 22_059_496, 9_216), ("vir_base_patch16_224", 86_585_320, 18_432)],
)
def test_parameters_are_the_cards_and_the_norms_beside_them(
    name: str, params: int, norms: int
) -> None:
    with torch.device("meta"):
        bare, normed = (timm.create_model(name, norm=norm) for norm in (False, True))
    assert sum(p.numel() for p in bare.parameters()) == params
    assert sum(p.numel() for p in normed.parameters()) == params + norms


def test_the_papers_preset_costs_what_a_vit_costs() -> None:
    report = measure(config("vir", "paper"))
    assert report.tokens["encoder.model.blocks"] == [197] * 12
    assert report.gmacs == pytest.approx(measure(config("supervised", "paper")).gmacs, rel=1e-3)


def test_tokens_positions_and_scales_are_not_decayed() -> None:
    method = build("vir")
    assert isinstance(method, Vir)
    names = {name for name, _ in method.param_groups()[1].params}
    wanted = ("pos_embed", "cls_token", "blocks.0.ls1.gamma", "blocks.0.attn.out_norm.weight")
    assert {f"encoder.model.{name}" for name in wanted} <= names


def test_the_rates_cool_down_for_ten_epochs() -> None:
    schedule = config("vir", "paper").schedule
    assert (schedule.curve_epochs, config("vir", "paper").train.epochs) == (310, 320)
    assert math.isclose(schedule.min_lr, 5e-6)


def test_what_has_no_state_is_refused_in_chunks() -> None:
    with pytest.raises(ConfigError, match="form=softmax has no state"):
        VirConfig(form=Form.softmax, mode=Mode.recurrent)
    with pytest.raises(ConfigError, match="chunk_size=0"):
        VirConfig(chunk_size=0)
