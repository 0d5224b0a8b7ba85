"""LookupViT: the card's checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import interpolate, layer_norm, softmax

from tests.contract.build import build, config, context
from vlx.core.capability import Budgets, ImageFeatures, ReducedTokens
from vlx.core.errors import ConfigError
from vlx.core.step import StepContext
from vlx.encoders.build import EncoderBuilder
from vlx.evals.tokens import gmacs
from vlx.methods.lookupvit import LookupVit, LookupVitConfig
from vlx.methods.lookupvit._network import LookupBlock, LookupVisionTransformer
from vlx.ops.resample import resize_tokens

PARAMS = {"tiny": (8_849_320, 8_737_288), "small": (34_507_624, 34_062_376),
          "base": (136_254_184, 134_478_952), "large": (480_866_280, 477_712_872)}  # fmt: skip
GMACS = {"tiny": (0.433, 0.562, 0.760, 1.199), "small": (1.650, 2.119, 2.832, 4.383),
         "base": (6.433, 8.217, 10.910, 16.703), "large": (22.99, 29.27, 38.74, 59.04)}  # fmt: skip
PLAIN = {"tiny": 1.254, "small": 4.599, "base": 17.564, "large": 61.56}
META = torch.device("meta")


def network(**kwargs) -> LookupVisionTransformer:
    """A small one: 36 patches, width 24."""
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
    model = timm.create_model("lookupvit_tiny", num_classes=7, **(sizes | kwargs)).eval()
    assert isinstance(model, LookupVisionTransformer)
    for parameter in model.parameters():  # away from zero biases and unit norms
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def count(model: torch.nn.Module, grids: tuple[int, ...], side: int = 224) -> list[float]:
    """GMACs at each compressed grid."""
    with META, torch.no_grad():
        return [
            gmacs(lambda x, g=grid: model.forward_head(model.forward_features(x, g)), side, META)
            for grid in grids
        ]


@pytest.mark.parametrize("size", PARAMS)
def test_parameters_and_gmacs_are_the_cards(size: str) -> None:
    name = f"lookupvit_{size}"
    with META:
        whole, model = (timm.create_model(name, last_write_back=x).eval() for x in (True, False))
        plain = timm.create_model(model.plain).eval()
    assert tuple(sum(p.numel() for p in m.parameters()) for m in (whole, model)) == PARAMS[size]
    # The resizing is counted here, as a product.
    assert count(model, (3, 5, 7, 10)) == pytest.approx(GMACS[size], rel=4e-3)
    with META, torch.no_grad():
        assert gmacs(plain, 224, META) == pytest.approx(PLAIN[size], rel=1e-3)


def test_gmacs_with_the_last_write_back_and_at_384_are_the_cards() -> None:
    sizes = {"last_write_back": True}
    with META:
        small, large = (
            timm.create_model("lookupvit_base", img_size=side, **sizes).eval()
            for side in (224, 384)
        )
    found = count(small, (3, 5, 7, 10))
    assert found == pytest.approx((6.671, 8.467, 11.177, 17.008), rel=2e-3)
    assert count(large, (5, 7, 10), 384) == pytest.approx((19.71, 22.67, 29.04), rel=2e-3)


def test_the_cost_of_a_block_is_the_papers_formula() -> None:
    dim, patches, compressed = 192, 196, 25
    with META:
        block = LookupBlock(
            dim, 3, mlp_ratio=4.0, thin_ratio=0.5, drop_path=0.0, write_back=True
        ).eval()
        streams = torch.empty(1, compressed, dim), torch.empty(1, patches, dim)
        found = gmacs(lambda _: block(*streams), 1, META)
    products = (3 * patches * compressed + 2 * compressed**2) * dim
    assert found * 1e9 == products + (4 * patches + 15 * compressed) * dim**2


def test_a_block_equals_a_naive_loop() -> None:
    torch.manual_seed(0)
    dim, heads = 6, 2
    block = LookupBlock(dim, heads, mlp_ratio=2.0, thin_ratio=0.5, drop_path=0.0, write_back=True)
    compressed, lookup = torch.randn(1, 3, dim), torch.randn(1, 5, dim)
    weight, bias = block.gather.qkv.weight, block.gather.qkv.bias
    query = block.norm_query(compressed)[0] @ weight[:dim].T + bias[:dim]
    key, value = (
        block.norm_key(lookup)[0] @ weight[part].T + bias[part]
        for part in (slice(dim, 2 * dim), slice(2 * dim, None))
    )
    gathered, maps = torch.zeros(3, dim), []
    for head in (slice(0, 3), slice(3, 6)):
        logits = torch.zeros(3, 5)
        for i in range(3):
            for j in range(5):
                logits[i, j] = (query[i, head] * key[j, head]).sum() / 3**0.5
        maps.append(softmax(logits, -1))
        gathered[:, head] = maps[-1] @ value[:, head]
    few = block.refine(compressed + block.gather.proj(gathered))
    assert block.write_back is not None
    back, values = torch.zeros(5, dim), block.write_back.value(block.norm_write(few))[0]
    for attention, head in zip(maps, (slice(0, 3), slice(3, 6))):
        for j in range(5):
            for i in range(3):
                back[j, head] += attention[i, j] * values[i, head]  # not renormalised over i
    many = lookup + block.write_back.proj(back)
    many = many + block.thin_mlp(block.norm_thin(many))
    found = block(compressed, lookup)
    torch.testing.assert_close(found[0], few)
    torch.testing.assert_close(found[1], many)


def test_the_map_sums_to_one_over_the_lookup_tokens_and_to_m_over_n_the_other_way() -> None:
    model = network()
    compressed, lookup = model.embed(images())
    block = model.blocks[0]
    assert isinstance(block, LookupBlock)
    attention = block.attention_map(compressed, lookup)[1]
    assert attention.shape == (2, 3, 25, 36)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 25))
    torch.testing.assert_close(attention.sum(-2).mean(-1), torch.full((2, 3), 25 / 36))


def test_equal_grids_start_with_equal_streams_and_others_are_resized_as_torch_does() -> None:
    model = network()
    compressed, lookup = model.embed(images(), 6)
    assert torch.equal(compressed, lookup)
    for side in (2, 4, 5):
        maps = lookup.transpose(1, 2).unflatten(2, (6, 6))
        expected = interpolate(maps, (side, side), mode="bilinear", antialias=True)
        found = resize_tokens(lookup, (6, 6), side)
        torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2))
    ramp = torch.arange(12.0).view(1, 12, 1)  # a grid of 2 rows and 6 columns
    tall = interpolate(ramp.view(1, 1, 2, 6), (2, 2), mode="bilinear", antialias=True)
    torch.testing.assert_close(resize_tokens(ramp, (2, 6), 2), tall.flatten(2).transpose(1, 2))


def test_without_what_writes_back_the_lookup_tokens_stay_patches_and_positions() -> None:
    model = network(last_write_back=True)
    for block in model.blocks:
        assert isinstance(block, LookupBlock)
        assert block.write_back is not None
        for last in (block.write_back.proj, block.thin_mlp.fc2):
            assert isinstance(last, Linear)
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    assert torch.equal(model.forward_streams(images())[1], model.embed(images())[1])


def test_the_order_of_the_lookup_tokens_does_not_matter_to_the_compressed_ones() -> None:
    model = network(last_write_back=True)
    compressed, lookup = model.embed(images())
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    straight, mixed = (compressed, lookup), (compressed, lookup[:, order])
    for block in model.blocks:
        straight, mixed = block(*straight), block(*mixed)
    torch.testing.assert_close(mixed[0], straight[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], straight[1][:, order], rtol=1e-4, atol=1e-5)


def test_no_parameter_depends_on_the_grid() -> None:
    small, large = network(compressed_grid=2), network(compressed_grid=5)
    large.load_state_dict(small.state_dict())
    assert torch.isfinite(large(images())).all()
    assert torch.equal(small.forward_features(images(), 5), large.forward_features(images()))


def test_every_parameter_has_a_gradient_unless_the_last_block_writes_back() -> None:
    def untouched(model: LookupVisionTransformer) -> set[str]:
        model.train()(images()).square().sum().backward()
        return {
            name
            for name, param in model.named_parameters()
            if param.grad is None or not param.grad.abs().sum()
        }

    assert untouched(network()) == set()
    idle = untouched(network(last_write_back=True))
    assert idle
    assert all(name.startswith("blocks.2.") for name in idle)


def test_timms_conventions_hold() -> None:
    model = network(compressed_grid=3)
    features = model.forward_features(images())
    assert features.shape == (2, 9, model.num_features)
    assert torch.equal(model.forward_head(features), model(images()))
    assert model.forward_head(features, pre_logits=True).shape == (2, 24)
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    last, maps = model.forward_intermediates(images(), indices=[0, 2])
    assert torch.equal(last, features)
    lookup = model.forward_streams(images())[1]
    assert torch.equal(maps[1], lookup.transpose(1, 2).reshape(2, 24, 6, 6))
    extractor = timm.create_model(
        "lookupvit_tiny", features_only=True, img_size=24, patch_size=4, embed_dim=24, depth=3,
        num_heads=3, out_indices=(0, 1),
    )  # fmt: skip
    assert [m.shape for m in extractor(images())] == [(2, 24, 6, 6)] * 2
    assert extractor.feature_info.reduction() == [4, 4]
    model.reset_classifier(5)
    assert model(images()).shape == (2, 5)
    assert isinstance(model.get_classifier(), Linear)
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, 9, 24)


def test_checkpointing_gives_the_same_gradients() -> None:
    model = network().train()
    model(images()).square().sum().backward()
    plain = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images()).square().sum().backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, plain[name])


def test_no_graph_breaks_under_compile() -> None:
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)


def smoke() -> LookupVit:
    method = build("lookupvit")
    assert isinstance(method, LookupVit)
    return method


def at(step: int, offset: int = 0) -> StepContext:
    ctx = context(step)
    ctx.sample_offset = offset
    return ctx


def test_a_step_draws_one_grid_and_all_processes_the_same() -> None:
    method = smoke()
    drawn = [method.draw_grid(at(step)) for step in range(200)]
    assert drawn == [method.draw_grid(at(step, offset=32)) for step in range(200)]
    assert set(drawn) == {2, 3}
    assert 70 < drawn.count(2) < 130
    side = method.encoder.spec.image_size
    batch = {"image": torch.rand(4, 3, side, side), "label": torch.arange(4)}
    method.eval()
    for step in range(4):
        logits = method.logits_at(batch["image"], drawn[step])
        smoothed = torch.full((4, 10), 0.01).scatter(1, batch["label"][:, None], 0.91)
        expected = -(smoothed * logits.log_softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(method.step(batch, at(step)).losses["class"], expected)


def test_exports_evaluate_each_grid_and_the_patches_of_the_lookup_stream() -> None:
    method = smoke().eval()
    found = {kind: c for c in method.exports() for kind in type(c).__mro__}
    side = method.encoder.spec.image_size
    pixels = torch.rand(2, 3, side, side)
    budgets = found[Budgets].budgets()
    assert list(budgets) == ["2x2", "3x3"]
    assert torch.equal(budgets["3x3"](pixels), method.class_logits(pixels))
    assert torch.equal(budgets["2x2"](pixels), method.logits_at(pixels, 2))
    maps = found[ImageFeatures].patch_features(pixels)
    lookup = method.backbone.forward_streams(method.encoder.normalise(pixels))[1]
    expected = layer_norm(lookup, lookup.shape[-1:]).transpose(1, 2).reshape(2, -1, 8, 8)
    torch.testing.assert_close(maps, expected)
    reduced = found[ReducedTokens]
    assert reduced.token_counts() == {"lookup": [64] * 3, "compressed": [9] * 3}
    assert not reduced.trained_plain
    assert reduced.plain(pixels).shape == reduced.reduced(pixels).shape
    (_, groups), *_ = reduced.groups(pixels)
    assert groups.shape == (2, 64)
    assert set(groups.unique().tolist()) <= set(range(9))


def test_budgets_are_reported_by_the_evaluator() -> None:
    from vlx.evals.base import EvalData, Subject
    from vlx.evals.budgets import BudgetCurve

    cfg, method = config("lookupvit"), smoke().eval()
    cfg.eval.speed_batches = [2]
    data = EvalData(cfg.data, cfg.eval, image_size=32, device=torch.device("cpu"))
    found = BudgetCurve().run(Subject("lookupvit", method.exports()), data)
    assert found.num_samples == 360
    assert {"top1/2x2", "top1/3x3", "images-per-s-batch2/3x3"} <= found.metrics.keys()
    assert found.metrics["gmacs/2x2"] < found.metrics["gmacs/3x3"]
    assert found.units["gmacs/2x2"] == "GMACs of one image"


def test_positions_are_not_decayed() -> None:
    decay, spared = smoke().param_groups()
    names = [name for name, _ in spared.params]
    assert "encoder.model.pos_embed" in names
    assert all(p.ndim >= 2 for _, p in decay.params)


@pytest.mark.parametrize("grids", [[], [0], [-1, 3], [3, 3]])
def test_impossible_grids_are_refused(grids: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"method.grids=.*different sides of 1 or more"):
        LookupVitConfig(grids=grids)


def test_other_backbones_and_grids_beyond_the_patches_are_refused_when_built() -> None:
    cfg = config("lookupvit")

    def refused(encoder, method=cfg.method) -> str:
        with pytest.raises(ConfigError) as error:
            LookupVit(method, EncoderBuilder({"encoder": encoder}, 10, load_weights=False))
        return str(error.value)

    line = refused(cfg.encoder, replace(cfg.method, grids=[9]))
    assert line == "method.grids: 9x9 compressed tokens of 8x8 patches; a side may be 1 to 8"
    plain = replace(cfg.encoder, name="deit_tiny_patch16_224")
    assert "is a TimmVit" not in refused(plain)
    assert "encoder.name=lookupvit_small" in refused(plain)
    assert "resnet18 does not take" in refused(replace(cfg.encoder, name="resnet18"))
    assert "encoder.image_size=9" in refused(replace(cfg.encoder, image_size=9))
