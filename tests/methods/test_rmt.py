"""RMT: the card's checks."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from tests.contract.build import build, config
from vlx.core.errors import ConfigError
from vlx.methods.rmt import (
    Decay,
    DecayPlace,
    ManhattanAttention,
    Rmt,
    attend_decomposed,
    attend_whole,
    decayed_logits,
    decayed_weights,
    rotate,
    stem,
)
from vlx.ops.distance import line_distances, manhattan_distances, squared_distances

# name -> parameters, GMACs with the attention's products (card), millions and GFLOPs (paper).
PUBLISHED = {
    "rmt_tiny": (14_334_216, 2.64, 14, 2.5),
    "rmt_small": (26_967_240, 4.78, 27, 4.5),
    "rmt_base": (54_154_896, 10.37, 54, 9.7),
    "rmt_large": (95_464_864, 19.49, 95, 18.2),
}
SMALL = {
    "embed_dims": (16, 32, 32),
    "depths": (1, 1, 2),
    "num_heads": (2, 4, 4),
    "head_ranges": (4, 4, 6),
    "ffn_ratios": (3, 3, 3),
    "decomposed": (True, True, False),
    "layer_scales": (False, False, False),
    "strides": (4, 2, 2),
    "projection": 24,
    "num_classes": 5,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_gmacs_are_the_papers(name: str) -> None:
    params, gmacs, millions, published = PUBLISHED[name]
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as flops:
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == params
    assert params / 1e6 == pytest.approx(millions, abs=0.5)
    macs = flops.get_total_flops() / 2
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.002)
    # The paper's figures are these in units of 2^30: all four agree so and none in units of 1e9.
    assert macs / 2**30 == pytest.approx(published, rel=0.02)


def test_maps_at_224_are_the_cards() -> None:
    with torch.device("meta"):
        maps = timm.create_model("rmt_small", features_only=True)(torch.empty(1, 3, 224, 224))
    assert [features.shape[-1] for features in maps] == [56, 28, 14, 7]


# --- decay -------------------------------------------------------------------------------------


def decay(heads: int = 4, head_range: float = 4, place=DecayPlace.logits) -> Decay:
    return Decay(8 * heads, heads, head_range=head_range, place=place)


def test_rates_of_the_heads() -> None:
    for name in PUBLISHED:
        for stage in timm.create_model(name, depths=(1, 1, 1, 1)).stages:
            assert float(stage.decay.log_gamma[0].exp()) == pytest.approx(0.75)
    rates = decay(4, 6).log_gamma.exp()
    assert rates.tolist() == pytest.approx([1 - 2 ** (-2 - 6 * i / 4) for i in range(4)])


def test_a_bias_is_manhattan_distance_times_log_gamma() -> None:
    law = decay()
    (bias,) = law((3, 5), False).biases
    assert bias.shape == (4, 15, 15)
    assert torch.equal(bias, bias.transpose(1, 2))
    assert not bias.diagonal(dim1=1, dim2=2).any()
    for i in range(15):
        for j in range(15):
            steps = abs(i // 5 - j // 5) + abs(i % 5 - j % 5)
            torch.testing.assert_close(bias[:, i, j], steps * law.log_gamma)


def test_the_whole_decay_is_the_kronecker_product_of_rows_and_columns() -> None:
    law = decay()
    whole = law((3, 5), False).biases[0].exp()
    columns, rows = (bias.exp() for bias in law((3, 5), True).biases)  # along w, along h
    for head in range(4):
        torch.testing.assert_close(torch.kron(rows[head], columns[head]), whole[head])


def test_distances_of_a_grid() -> None:
    assert line_distances(3).tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    for i in range(6):
        for j in range(6):
            rows, columns = abs(i // 3 - j // 3), abs(i % 3 - j % 3)
            assert manhattan_distances((2, 3))[i, j] == rows + columns
            assert squared_distances((2, 3))[i, j] == rows**2 + columns**2


def test_decay_and_angles_are_not_trained() -> None:
    model = Rmt(**SMALL)
    names = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    assert not any("gamma" in name or "angle" in name for name in names)


# --- attention -----------------------------------------------------------------------------------


def projections(places: int, heads: int = 4, width: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, places, heads, width) for _ in range(3)]


def test_rotation_turns_pairs_by_the_raster_index() -> None:
    at = decay()((2, 3), True)
    x, _, _ = projections(6)
    turned = rotate(x, at)
    index = torch.arange(6.0)
    for pair in range(4):
        angle = index / 10000 ** (pair / 3)
        sin, cos = angle.sin()[:, None], angle.cos()[:, None]
        first, second = x[..., 2 * pair], x[..., 2 * pair + 1]
        torch.testing.assert_close(turned[..., 2 * pair], first * cos - second * sin)
        torch.testing.assert_close(turned[..., 2 * pair + 1], second * cos + first * sin)


def test_without_decay_whole_attention_is_the_plain_one() -> None:
    q, k, v = projections(12)
    at = decay(place=DecayPlace.nowhere)((3, 4), False)
    weights = (torch.einsum("bind,bjnd->bnij", q, k) / 8**0.5).softmax(-1)
    expected = torch.einsum("bnij,bjnd->bind", weights, v)
    torch.testing.assert_close(attend_whole(q, k, v, at, decayed_logits), expected)
    torch.testing.assert_close(attend_whole(q, k, v, at, decayed_weights), expected)


@pytest.mark.parametrize("after", [False, True])
def test_decay_before_and_after_the_softmax(after: bool) -> None:
    q, k, v = projections(12)
    at = decay()((3, 4), False)
    powers = at.biases[0].exp()
    logits = torch.einsum("bind,bjnd->bnij", q, k) / 8**0.5
    weights = logits.softmax(-1) * powers
    if not after:  # gamma^distance multiplies the weights, which then sum to one
        weights = logits.exp() * powers
        weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bnij,bjnd->bind", weights, v)
    attend = decayed_weights if after else decayed_logits
    torch.testing.assert_close(attend_whole(q, k, v, at, attend), expected)


def test_decomposed_attention_goes_along_rows_then_columns() -> None:
    q, k, v = projections(12)
    at = decay()((3, 4), True)
    q5, k5, v5 = (part.unflatten(1, (3, 4)) for part in (q, k, v))
    along_w, along_h = at.biases
    rows = torch.einsum("bhind,bhjnd->bhnij", q5, k5) / 8**0.5 + along_w
    out = torch.einsum("bhnij,bhjnd->bhind", rows.softmax(-1), v5)
    columns = torch.einsum("biwnd,bjwnd->bwnij", q5, k5) / 8**0.5 + along_h
    out = torch.einsum("bwnij,bjwnd->biwnd", columns.softmax(-1), out)
    found = attend_decomposed(q, k, v, at, decayed_logits)
    torch.testing.assert_close(found, out.flatten(1, 2))


def test_on_a_single_row_decomposed_attention_is_whole_attention() -> None:
    q, k, v = projections(7)
    law = decay()
    whole = attend_whole(q, k, v, law((1, 7), False), decayed_logits)
    parts = attend_decomposed(q, k, v, law((1, 7), True), decayed_logits)
    torch.testing.assert_close(whole, parts)


def test_the_convolved_values_are_added_before_the_output_projection() -> None:
    torch.manual_seed(0)
    attn = ManhattanAttention(32, 4, decomposed=False, place=DecayPlace.logits)
    at, x = decay()((3, 4), False), torch.randn(2, 12, 32)
    with torch.no_grad():
        with_lepe = attn(x, at)
        lepe = attn.lepe(attn.v(x), (3, 4))
        attn.lepe.weight.zero_()
        attn.lepe.bias.zero_()  # type: ignore[union-attr]
        without = attn(x, at)
    expected = without + torch.nn.functional.linear(lepe, attn.proj.weight)
    torch.testing.assert_close(with_lepe, expected)


# --- model ---------------------------------------------------------------------------------------


def test_the_head_normalises_every_place_before_the_mean() -> None:
    model = Rmt(**SMALL).eval()
    model.norm.running_mean.uniform_()  # type: ignore[union-attr]
    features = torch.randn(2, 32, 2, 2)
    with torch.no_grad():
        places = [model.proj(features[:, :, i, j]) for i in range(2) for j in range(2)]
        pooled = torch.stack([silu(model.norm(each)) for each in places]).mean(0)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
        torch.testing.assert_close(model.forward_head(features), model.head(pooled))


def test_layer_scale_is_in_the_late_stages_of_the_large_models() -> None:
    for name in PUBLISHED:
        with torch.device("meta"):
            model = timm.create_model(name)
        scaled = [stage.blocks[0].gamma1 is not None for stage in model.stages]
        late = name in ("rmt_base", "rmt_large")
        assert scaled == [False, False, late, late]


def test_drop_path_rises_over_all_blocks() -> None:
    model = Rmt(**SMALL, drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_any_size_runs_with_the_same_weights() -> None:
    model = Rmt(**SMALL).eval()
    with torch.no_grad():
        for size in ((32, 32), (64, 48), (40, 56)):
            assert model(torch.rand(1, 3, *size)).shape == (1, 5)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_stem_shrinks_by_its_stride(stride: int) -> None:
    assert stem(3, 8, stride)(torch.rand(2, 3, 16, 16)).shape == (2, 8, 16 // stride, 16 // stride)


def test_a_stem_of_another_stride_is_refused() -> None:
    with pytest.raises(ConfigError, match="a stride of 1, 2 or 4, not 3"):
        stem(3, 8, 3)


def test_the_config_chooses_where_the_decay_acts() -> None:
    model = build("rmt").encoder.backbone
    assert model.stages[0].blocks[0].attn.attend is decayed_logits
    assert [stage.decomposed for stage in model.stages] == config("rmt").method.decomposed
