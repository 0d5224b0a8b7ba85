"""STViT and STViT-R: the card's checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import Identity
from torch.nn.functional import adaptive_max_pool2d, unfold

from tests.contract.build import build, config
from vlx.blocks.vit_block import attend, cross_block
from vlx.core.capability import ImageFeatures, ReducedTokens
from vlx.core.errors import ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.evals.tokens import gmacs
from vlx.methods.stvit import Start, Stvit, StvitConfig
from vlx.methods.stvit._deit import SemanticVisionTransformer
from vlx.methods.stvit._pooling import max_pool_grid
from vlx.methods.stvit._swin import SemanticStage, SemanticSwin, SemanticUnit, cut

META = torch.device("meta")
SIZES = {  # parameters, GMACs, those of the plain model
    "stvit_deit_tiny": (5_720_104, 0.522, 1.254),
    "stvit_deit_small": (22_056_040, 1.907, 4.599),
    "stvit_deit_base": (86_578_408, 7.263, 17.564),
    "stvit_r_swin_small": (49_625_518, 5.80, 8.74),
    "stvit_r_swin_base": (87_812_336, 10.23, 15.43),
}


def deit(**kwargs) -> SemanticVisionTransformer:
    """A small one: 8x8 patches, 16 tokens after two layers."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 24, "depth": 5, "num_heads": 3}
    layers = {"base_layers": 2, "gather_layers": 2}
    name = "stvit_deit_tiny"
    model = timm.create_model(name, num_classes=7, **(sizes | layers | kwargs)).eval()
    assert isinstance(model, SemanticVisionTransformer)
    return model


def swin(**kwargs) -> SemanticSwin:
    """A small one: 8x8 places in stage 3, two windows of 4 a side, 2x2 tokens each."""
    torch.manual_seed(0)
    sizes = {"img_size": 128, "embed_dim": 8, "depths": (1, 1, 12, 1), "num_heads": (1, 2, 2, 4)}
    window = {"window_size": 4, "token_side": 2}
    model = timm.create_model(
        "stvit_r_swin_small", num_classes=7, **(sizes | window | kwargs)
    ).eval()
    assert isinstance(model, SemanticSwin)
    return model


def stage_of(model: SemanticSwin) -> SemanticStage:
    stage = model.layers[2]
    assert isinstance(stage, SemanticStage)
    return stage


def unit_of(model: SemanticSwin, number: int = 0) -> SemanticUnit:
    unit = stage_of(model).blocks[number]
    assert isinstance(unit, SemanticUnit)
    return unit


def count(model: torch.nn.Module) -> float:
    with META, torch.no_grad():
        return gmacs(model.eval(), 224, META)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_gmacs_are_the_cards(name: str) -> None:
    params, reduced, plain = SIZES[name]
    with META:
        model = timm.create_model(name)
        reference = timm.create_model(model.plain)
    assert sum(p.numel() for p in model.parameters()) == params
    assert count(model) == pytest.approx(reduced, rel=1e-3)
    assert count(reference) == pytest.approx(plain, rel=1e-3)


def test_gmacs_of_other_depths_and_token_counts_are_the_cards() -> None:
    with META:
        model = timm.create_model("stvit_deit_small")

    def counted(**sizes: int) -> float:
        for name, value in sizes.items():
            setattr(model, name, value)
        if "token_side" in sizes:
            model.centres = torch.nn.Parameter(
                torch.empty(1, sizes["token_side"] ** 2, 384).to(META)
            )
        return count(model)

    found = [counted(gather_layers=layers) for layers in (2, 3, 4)]
    assert found == pytest.approx((1.907, 1.967, 2.027), rel=1e-3)
    found = [counted(gather_layers=2, base_layers=layers) for layers in (3, 8)]
    assert found == pytest.approx((1.559, 3.298), rel=1e-3)
    found = [counted(base_layers=4, token_side=side) for side in (2, 3, 5, 6, 7)]
    assert found == pytest.approx((1.736, 1.807, 2.036, 2.196, 2.386), rel=1e-3)


def tokens_in_mlps(model: torch.nn.Module) -> list[int]:
    """Of every MLP that runs, in order."""
    seen: list[int] = []
    for module in model.modules():
        if type(module).__name__ == "Mlp":
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    side = model.patch_embed.img_size[0]
    model(torch.randn(1, 3, side, side))
    return seen


def test_tokens_by_layer_are_the_cards_and_those_that_ran() -> None:
    with META:
        counts = timm.create_model("stvit_deit_small").token_counts()
        grid = timm.create_model("stvit_r_swin_small").token_counts()
    assert counts["mlp"] == [196] * 4 + [16] * 8
    assert counts["keys"] == [196] * 5 + [212] + [16] * 6
    assert grid["mlp"] == [3136] * 2 + [784] * 2 + [196, 36, 36, 36, 36, 196] * 3 + [49] * 2
    assert grid["keys"][4:10] == [49, 109, 232, 9, 36, 36]
    for model in (deit(), swin()):
        seen = tokens_in_mlps(model)
        counts = model.token_counts()["mlp"]
        if isinstance(model, SemanticSwin):  # by window in these layers: 4 windows, 4 tokens each
            assert seen[3] == seen[5] == 4
            seen = [n * 4 if n == 4 else n for n in seen]
        assert seen == counts


@pytest.mark.parametrize(("length", "side"), [(8, 4), (14, 4), (7, 3), (5, 5), (6, 1)])
def test_pooling_is_torchs_adaptive_maximum(length: int, side: int) -> None:
    maps = torch.randn(2, length, length + 1, 3)
    expected = adaptive_max_pool2d(maps.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
    assert torch.equal(max_pool_grid(maps, side), expected)


def test_a_gathering_layer_on_all_patches_is_a_plain_block() -> None:
    model = deit(token_side=8, start="pooling", gather_layers=1)
    patches = model.base(torch.randn(2, 3, 16, 16))
    tokens, keys = model.gather(patches, 1)
    torch.testing.assert_close(tokens, model.blocks[2](patches))
    assert torch.equal(keys, torch.cat([tokens, patches], 1))


def test_centres_move_the_second_layers_queries_and_nothing_else() -> None:
    model = deit()
    assert model.centres is not None
    patches = model.base(torch.randn(2, 3, 16, 16))
    first, keys = model.gather(patches, 1)
    without = deit(start="pooling")
    assert without.centres is None
    without.load_state_dict({n: v for n, v in model.state_dict().items() if n != "centres"})
    assert torch.equal(without.gather(patches, 1)[0], first)
    second = cross_block(model.blocks[3], first + model.centres, keys)  # type: ignore[arg-type]
    assert torch.equal(model.gather(patches, 2)[0], second)
    assert torch.equal(keys[:, :16], first)  # keys without the centres
    alone = deit(start="centres")
    assert alone.centres is not None
    assert torch.equal(alone.start_tokens(patches)[1], alone.centres[0])
    assert alone.queries(first, 1) is first


def test_every_parameter_and_every_patch_has_a_gradient() -> None:
    for model, side in ((deit(), 16), (deit(start="centres"), 16), (swin(start="both"), 128)):
        for norm in model.modules():  # layer scale of 1e-5 would hide what lies behind it
            if type(norm).__name__ == "LayerScale":
                torch.nn.init.ones_(norm.gamma)  # type: ignore[arg-type]
        pixels = torch.randn(2, 3, side, side, requires_grad=True)
        model.train()(pixels).square().sum().backward()
        for name, param in model.named_parameters():
            assert param.grad is not None, name
            assert param.grad.abs().sum() > 0, name
        assert pixels.grad is not None
        assert (pixels.grad.abs().sum(1) > 0).all()


def test_only_the_pooling_sees_where_a_patch_lies() -> None:
    model = deit()
    patches = model.embed(torch.randn(1, 3, 16, 16))

    def logits(order: Tensor) -> Tensor:
        x = patches[:, order]
        for index in range(2):
            x = model.blocks[index](x)
        tokens = model.blocks[4](model.gather(x, 2)[0])
        return model.forward_head(model.norm(tokens))

    straight = torch.arange(64)
    bins = straight.view(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)  # patches of each 2x2 bin
    inside = straight.clone()
    for members in bins:
        inside[members] = members[torch.tensor([2, 0, 3, 1])]
    torch.testing.assert_close(logits(inside), logits(straight), rtol=1e-4, atol=1e-5)
    across = straight.roll(1)
    assert not torch.allclose(logits(across), logits(straight), rtol=1e-4, atol=1e-5)


def test_windows_are_the_codes_unfold_at_14x14() -> None:
    x = torch.randn(2, 14, 14, 3)
    patches = unfold(x.permute(0, 3, 1, 2), kernel_size=10, stride=4)  # (B, 3 * 100, 4)
    expected = patches.view(2, 3, 10, 10, 4).permute(0, 4, 2, 3, 1).flatten(0, 1)
    assert torch.equal(cut(x, 7, 3), expected)
    own = x.view(2, 2, 7, 2, 7, 3).transpose(2, 3).reshape(8, 7, 7, 3)
    assert torch.equal(cut(x, 7, 0), own)
    many = cut(torch.arange(28.0).view(1, 28, 1, 1).expand(1, 28, 28, 1), 7, 3)
    assert many.shape == (16, 13, 13, 1)  # four windows a side, each of 7 + 3 + 3
    assert many[::4, 0, 0, 0].tolist() == [0, 4, 11, 15]


def test_a_unit_equals_its_six_layers_one_by_one() -> None:
    model = swin()
    unit = unit_of(model)
    for block in (unit.gather_local, unit.gather_global, unit.refine_local, unit.refine_global,
                  unit.recover):  # fmt: skip
        torch.nn.init.ones_(block.ls1.gamma)  # type: ignore[arg-type]
        torch.nn.init.ones_(block.ls2.gamma)  # type: ignore[arg-type]
    x = torch.randn(1, 8, 8, 32)
    full = unit.full(x)
    tokens = []
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8)):
            window = full[:, rows, columns]
            pooled = adaptive_max_pool2d(window.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
            wide = full[:, slice(0, 7) if rows.start == 0 else slice(1, 8)]
            wide = wide[:, :, slice(0, 7) if columns.start == 0 else slice(1, 8)]
            keys = torch.cat([pooled, wide.flatten(1, 2)], 1)
            tokens.append(cross_block(unit.gather_local, pooled, keys))
    few, flat = torch.cat(tokens, 1), full.flatten(1, 2)
    few = cross_block(unit.gather_global, few, torch.cat([few, flat], 1))
    few = torch.cat([unit.refine_local(part) for part in few.split(4, dim=1)], 1)
    few = unit.refine_global(few)
    expected = cross_block(unit.recover, flat, few).view(1, 8, 8, 32)
    torch.testing.assert_close(unit(x), expected)


def test_recovery_keeps_the_grid_and_is_the_identity_without_its_scale() -> None:
    model = swin()
    unit = unit_of(model)
    x = torch.randn(2, 8, 8, 32)
    assert unit(x).shape == x.shape
    # Every place is a query of its own: at a scale of 1e-5 its own value dominates.
    torch.testing.assert_close(unit(x), unit.full(x), rtol=1e-2, atol=1e-3)
    assert not torch.equal(unit(x), unit.full(x))
    torch.nn.init.zeros_(unit.recover.ls1.gamma)  # type: ignore[arg-type]
    torch.nn.init.zeros_(unit.recover.ls2.gamma)  # type: ignore[arg-type]
    assert torch.equal(unit(x), unit.full(x))


def test_stage_three_shifts_no_window_and_scales_only_the_semantic_layers() -> None:
    model = swin(drop_path_rate=0.3)
    for number in (0, 1):
        unit = unit_of(model, number)
        assert unit.full.shift_size == (0, 0)
        assert not hasattr(unit.full, "ls1")
        for index, block in enumerate((unit.gather_local, unit.gather_global, unit.refine_local,
                                       unit.refine_global, unit.recover)):  # fmt: skip
            assert torch.equal(block.ls1.gamma, torch.full((32,), 1e-5))  # type: ignore[union-attr]
            assert block.norm1.eps == 1e-5
            layer = 2 + 6 * number + 1 + index  # of 15
            assert block.drop_path1.drop_prob == pytest.approx(0.3 * layer / 14)  # type: ignore
    centres = stage_of(swin(start="both")).centres
    assert centres is not None
    assert centres.shape == (1, 16, 32)


@pytest.mark.parametrize("form", ["deit", "swin"])
def test_timms_conventions_hold(form: str) -> None:
    model = deit() if form == "deit" else swin()
    side = model.patch_embed.img_size[0]
    pixels = torch.randn(2, 3, side, side)
    features = model.forward_features(pixels)
    assert torch.equal(model.forward_head(features), model(pixels))
    assert features.shape == ((2, 16, 24) if form == "deit" else (2, 4, 4, 64))
    assert model.no_weight_decay()
    model.reset_classifier(5)
    assert model(pixels).shape == (2, 5)
    model.reset_classifier(0)
    assert model(pixels).shape == (2, model.num_features)
    with pytest.raises(ConfigError, match="create_model"):
        model.set_input_size((64, 64))


def test_features_only_gives_the_layers_that_have_a_grid() -> None:
    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 24, "depth": 6, "num_heads": 3}
    extractor = timm.create_model("stvit_deit_tiny", features_only=True, out_indices=2, **sizes)
    assert [m.shape for m in extractor(torch.randn(1, 3, 16, 16))] == [(1, 24, 8, 8)] * 2
    model = deit()
    maps = model.forward_intermediates(torch.randn(1, 3, 16, 16), intermediates_only=True)
    assert len(maps) == 2  # the base layers
    small = {"img_size": 128, "embed_dim": 8, "depths": (1, 1, 6, 1), "num_heads": (1, 2, 2, 4)}
    pyramid = timm.create_model(
        "stvit_r_swin_small", features_only=True, window_size=4, token_side=2, **small
    )
    maps = pyramid(torch.randn(1, 3, 128, 128))
    assert [tuple(m.shape[1:3]) for m in maps] == [(32, 32), (16, 16), (8, 8), (4, 4)]
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("form", ["deit", "swin"])
def test_no_graph_breaks_under_compile(form: str) -> None:
    model = deit() if form == "deit" else swin(depths=(1, 1, 6, 1))
    side = model.patch_embed.img_size[0]
    pixels = torch.randn(1, 3, side, side)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels), model(pixels), rtol=1e-4, atol=1e-5)


def test_exports_measure_it_beside_the_plain_model_with_a_picture_of_who_gathers_where() -> None:
    method = build("stvit").eval()
    found = {kind: c for c in method.exports() for kind in type(c).__mro__}
    pixels = torch.rand(2, 3, 32, 32)
    reduced = found[ReducedTokens]
    assert not reduced.trained_plain
    assert reduced.token_counts() == {"keys": [64, 64, 73, 9], "mlp": [64, 9, 9, 9]}
    assert torch.equal(reduced.reduced(pixels), method.class_logits(pixels))  # type: ignore
    assert reduced.plain(pixels).shape == (2, 10)
    (_, groups), *_ = reduced.groups(pixels)
    assert groups.shape == (2, 64)
    assert set(groups.unique().tolist()) <= set(range(9))
    assert found[ImageFeatures].patch_features(pixels).shape == (2, 24, 3, 3)


def test_who_gathers_where_is_read_from_the_last_gathering_on_swin_too() -> None:
    model = swin()
    groups = model.gatherers(torch.randn(2, 3, 128, 128))
    assert groups.shape == (2, 64)
    assert int(groups.max()) < stage_of(model).num_tokens


def swin_method(**method) -> Stvit:
    cfg = config("stvit")
    encoder = replace(
        cfg.encoder, name="stvit_r_swin_small", image_size=64, patch_size=None, dim=8, depth=None,
        heads=None,
    )  # fmt: skip
    builder = EncoderBuilder({"encoder": encoder}, 10, load_weights=False)

    class Small(Stvit):
        @classmethod
        def encoder_arguments(cls, cfg: StvitConfig):
            sizes = {"depths": (1, 1, 6, 1), "num_heads": (1, 2, 2, 4), "window_size": 2}
            return {**sizes, **super().encoder_arguments(cfg)}

    return Small(replace(StvitConfig(), **method), builder)


def test_the_swin_form_trains_by_the_same_method_and_spares_its_bias_tables() -> None:
    method = swin_method(token_side=1)
    decay, spared = method.param_groups()
    assert any("relative_position_bias_table" in name for name, _ in spared.params)
    assert not any("relative_position_bias_table" in name for name, _ in decay.params)
    assert method.class_logits(torch.rand(2, 3, 64, 64)).shape == (2, 10)
    maps = next(c for c in method.exports() if isinstance(c, ImageFeatures))
    assert maps.patch_features(torch.rand(2, 3, 64, 64)).shape == (2, 64, 2, 2)


def test_what_does_not_fit_is_refused_when_built() -> None:
    cfg = config("stvit")

    def refused(encoder=cfg.encoder, **method) -> str:
        builder = EncoderBuilder({"encoder": encoder}, 10, load_weights=False)
        with pytest.raises(ConfigError) as error:
            Stvit(replace(cfg.method, **method), builder)
        return str(error.value)

    assert "method.token_side=9: the encoder has 8x8 patches" in refused(token_side=9)
    assert "do not fit" in refused(base_layers=3, gather_layers=2)  # of 4 layers
    assert "do not fit" in refused(gather_layers=1)  # nowhere to add the centres
    assert "encoder.name=stvit_deit_small" in refused(
        replace(cfg.encoder, name="deit_tiny_patch16_224")
    )
    with pytest.raises(ConfigError, match="pooling or both"):
        swin_method(token_side=1, start=Start.centres)
    with pytest.raises(ConfigError, match="a window has 2x2 places"):
        swin_method(token_side=3)
    with pytest.raises(ConfigError, match="does not take"):
        swin_method(token_side=1, base_layers=2)
    with pytest.raises(ConfigError, match="not whole windows of 4"):
        swin(img_size=144)
    with pytest.raises(ConfigError, match="not units of 6"):
        swin(depths=(1, 1, 4, 1))
    with pytest.raises(ConfigError, match="patches of 4"):
        swin(patch_size=2)


def test_layers_without_layer_scale_stay_without() -> None:
    assert isinstance(deit().blocks[2].ls1, Identity)


def test_without_the_residual_the_windows_tokens_start_near_zero() -> None:
    """The released classification runs: what attention gives takes the pooled tokens' place."""
    torch.manual_seed(0)
    with_it = timm.create_model("stvit_r_swin_small", num_classes=5).eval()
    without = timm.create_model("stvit_r_swin_small", num_classes=5, window_residual=False).eval()
    without.load_state_dict(with_it.state_dict())
    x = torch.randn(1, 14, 14, 384)
    units = with_it.layers[2].blocks[0], without.layers[2].blocks[0]
    with torch.no_grad():
        kept, bare = (unit.gather_windows(x) for unit in units)
        pooled, keys = units[1].window_tokens(x)
        block = units[1].gather_local
        attended, _ = attend(block.attn, block.norm1(pooled), context=block.norm1(keys))
        start = block.ls1(attended)
        expected = start + block.ls2(block.mlp(block.norm2(start)))
    torch.testing.assert_close(bare, expected.reshape_as(bare))
    assert bare.abs().max() < 1e-3  # layer scales of 1e-5
    assert kept.abs().mean() > 0.1


@pytest.mark.parametrize("preset", ["swin-small", "swin-base"])
def test_the_released_runs_have_no_residual_there(preset: str) -> None:
    assert config("stvit", preset).method.window_residual is False
