"""SViT: the card's checks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale2d
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from tests.contract.build import NUM_CLASSES, build, config
from vlx.blocks.super_tokens import (
    MapAttention,
    SuperTokenAttention,
    around,
    associate,
    gather_around,
    super_tokens,
    to_cells,
    to_map,
)
from vlx.commands.dry_run import measure
from vlx.core.capability import ImageFeatures, ReducedTokens
from vlx.core.errors import ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.evals.tokens import gmacs
from vlx.methods.svit import PAPER, SuperTokenVit, Svit, SvitConfig

SMALL = {"dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1), "heads": (1, 2, 3, 4)}


def small(**changes: object) -> SuperTokenVit:
    """A narrow model through timm's own factory, every parameter with a value of its own."""
    model = timm.create_model("svit_small", **{**SMALL, "num_classes": 7, **changes})
    for index, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(index)
        param.data += 0.1 * torch.randn(param.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "params", "gmacs", "published"),
    [
        ("svit_small", 25_495_624, 4.34, (25, 4.4)),
        ("svit_base", 51_691_288, 9.82, (52, 9.9)),
        ("svit_large", 94_971_096, 15.54, (95, 15.6)),
    ],
)
def test_sizes_and_costs_are_the_cards_and_the_papers(
    name: str, params: int, gmacs: float, published: tuple[int, float]
) -> None:
    cfg = config("svit", "paper")
    found = measure(replace(cfg, encoder=replace(cfg.encoder, name=name)))
    assert found.trainable_params == found.total_params == params
    assert round(params / 1e6) == published[0]
    assert found.reduced_gmacs == pytest.approx(gmacs, abs=0.005)
    assert found.reduced_gmacs == pytest.approx(published[1], rel=0.02)
    depths = [len(stage.blocks) for stage in timm.create_model(name).stages]  # type: ignore[union-attr]
    tokens = [(49, 3136), (49, 784), (196, 196), (49, 49)]
    for place, kind in enumerate(("attention", "mlp")):
        by_layer = [pair[place] for pair, depth in zip(tokens, depths) for _ in range(depth)]
        assert found.tokens[kind] == by_layer


def test_attention_on_all_tokens_costs_twice_as_much() -> None:
    """What the forward of the plain backbone multiplies, not what building it does."""
    cfg, meta = config("svit", "paper"), torch.device("meta")
    with meta:
        builder = EncoderBuilder({"encoder": cfg.encoder}, 1000, load_weights=False)
        method = Svit(cfg.method, builder).eval()  # type: ignore[arg-type]
        reduction = next(part for part in method.exports() if isinstance(part, ReducedTokens))
        with torch.no_grad():
            assert gmacs(reduction.plain, 224, meta) == pytest.approx(9.26, abs=0.005)


def cells_of(x: Tensor, size: int) -> list[list[Tensor]]:
    """The tokens (C,) of every cell of a map (C, H, W), row-major in and over cells."""
    rows, columns = x.shape[1] // size, x.shape[2] // size
    return [
        [x[:, r * size + i, c * size + j] for i in range(size) for j in range(size)]
        for r in range(rows)
        for c in range(columns)
    ]


def neighbours(r: int, c: int, grid: tuple[int, int]) -> list[int | None]:
    """The 3x3 cells around one, row-major; None past the border."""
    places = [(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    inside = [0 <= i < grid[0] and 0 <= j < grid[1] for i, j in places]
    return [i * grid[1] + j if ok else None for (i, j), ok in zip(places, inside)]


def naive_attention(x: Tensor, module: SuperTokenAttention) -> Tensor:
    """Super token attention of one map (C, H, W), token by token; H, W multiples of the size."""
    size, channels = module.size, x.shape[0]
    grid = (x.shape[1] // size, x.shape[2] // size)
    cells = cells_of(x, size)
    pooled = [torch.stack(cell).mean(0) for cell in cells]
    sums = [torch.zeros(channels) for _ in cells]
    masses = [torch.zeros(()) for _ in cells]
    shares: list[list[Tensor]] = []
    for number, cell in enumerate(cells):
        near = neighbours(number // grid[1], number % grid[1], grid)
        shares.append([])
        for token in cell:
            logits = [0.0 if j is None else float(token @ pooled[j]) for j in near]
            share = (torch.tensor(logits) / channels**0.5).softmax(0)  # 0, not -inf, past the edge
            shares[-1].append(share)
            for place, j in enumerate(near):
                if j is not None:  # what goes past the edge is lost
                    sums[j] += share[place] * token
                    masses[j] += share[place]
    supers = torch.stack([s / m for s, m in zip(sums, masses)], 1).view(1, channels, *grid)
    attended = module.attention(supers)[0].flatten(1)  # (C, m)
    out = torch.zeros_like(x)
    for number, cell in enumerate(cells):
        r, c = number // grid[1], number % grid[1]
        for place in range(len(cell)):
            value = torch.zeros(channels)
            for k, j in enumerate(neighbours(r, c, grid)):
                if j is not None:
                    value += shares[number][place][k] * attended[:, j]
            out[:, r * size + place // size, c * size + place % size] = value
    return out


@pytest.mark.parametrize(("side", "size"), [((12, 8), 4), ((6, 6), 2), ((4, 4), 4), ((3, 9), 3)])
def test_super_token_attention_equals_a_naive_loop(side: tuple[int, int], size: int) -> None:
    torch.manual_seed(0)
    module = SuperTokenAttention(6, 2, size)
    x = 2 * torch.randn(2, 6, *side)
    with torch.no_grad():
        expected = torch.stack([naive_attention(image, module) for image in x])
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_equals_a_reference_with_the_same_weights() -> None:
    torch.manual_seed(0)
    module, x = MapAttention(12, 3), torch.randn(2, 12, 3, 5)
    tokens = x.flatten(2).transpose(1, 2)
    weight, bias = module.qkv.weight.view(3, 3, 4, 12), module.qkv.bias.view(3, 3, 4)  # type: ignore[union-attr]
    heads = []
    for head in range(3):  # channels lie by head: (heads, 3, width)
        q, k, v = (tokens @ weight[head, i].T + bias[head, i] for i in range(3))
        heads.append((q @ k.transpose(1, 2) / 4**0.5).softmax(-1) @ v)
    expected = torch.cat(heads, -1) @ module.proj.weight.view(12, 12).T + module.proj.bias
    torch.testing.assert_close(module(x).flatten(2).transpose(1, 2), expected)
    plain = SuperTokenAttention(12, 3, 1)
    plain.attention = module
    assert torch.equal(plain(x), module(x))


def test_cells_and_back() -> None:
    x = torch.randn(2, 3, 6, 9)
    cells = to_cells(x, 3)
    assert cells.shape == (2, 6, 9, 3)
    assert torch.equal(cells[0, 4], torch.stack(cells_of(x[0], 3)[4]))
    assert torch.equal(to_map(cells, (2, 3), 3), x)


def test_gathering_is_the_transpose_of_looking_around() -> None:
    a, b = torch.randn(1, 2, 3, 4), torch.randn(1, 12, 9, 2)
    torch.testing.assert_close((around(a) * b).sum(), (a * gather_around(b, (3, 4))).sum())


def test_shares_sum_to_1_and_the_border_takes_some() -> None:
    x = torch.randn(2, 6, 8, 8)
    shares = associate(to_cells(x, 4), adaptive_avg_pool2d(x, 2))  # (2, 4, 9, 16)
    torch.testing.assert_close(shares.sum(2), torch.ones(2, 4, 16))
    past = [k for k, j in enumerate(neighbours(0, 0, (2, 2))) if j is None]
    assert len(past) == 5
    assert (shares[:, 0, past] > 0).all()


def test_of_a_constant_the_super_tokens_are_constant_and_the_border_loses() -> None:
    x = torch.full((1, 4, 12, 12), 0.7)
    tokens = to_cells(x, 4)
    shares = associate(tokens, adaptive_avg_pool2d(x, 3))
    supers = super_tokens(tokens, shares, (3, 3))
    torch.testing.assert_close(supers, torch.full((1, 4, 3, 3), 0.7))
    spread = to_map(shares.transpose(2, 3) @ around(supers), (3, 3), 4)
    torch.testing.assert_close(spread[..., 4:8, 4:8], x[..., 4:8, 4:8])
    outer = torch.ones(12, 12, dtype=torch.bool)
    outer[4:8, 4:8] = False
    assert (spread[..., outer] < 0.69).all()


def test_no_gradient_passes_through_the_association() -> None:
    torch.manual_seed(0)
    module = SuperTokenAttention(6, 2, 4)
    x = torch.randn(1, 6, 8, 8)
    _, fixed, grid = module.assign(x)

    def gradient(detached: bool) -> Tensor:
        """Of a sum over outputs, with shares that are constants or functions of the input."""
        leaf = x.clone().requires_grad_()
        tokens = to_cells(leaf, 4)
        shares = fixed if detached else associate(tokens, adaptive_avg_pool2d(leaf, grid))
        attended = module.attention(super_tokens(tokens, shares, grid))
        out = to_map(shares.transpose(2, 3) @ around(attended), grid, 4)
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    torch.testing.assert_close(found, gradient(detached=True))
    assert not torch.allclose(found, gradient(detached=False), rtol=1e-2)
    assert found.abs().sum() > 0


@pytest.mark.parametrize(("height", "width"), [(30, 30), (9, 16), (1, 1)])
def test_a_map_that_is_no_multiple_is_padded_after_the_norm_with_zeros(
    height: int, width: int
) -> None:
    torch.manual_seed(0)
    module, x = SuperTokenAttention(4, 1, 8), torch.randn(2, 4, height, width)
    rows, columns = -(-height // 8) * 8, -(-width // 8) * 8
    padded = torch.zeros(2, 4, rows, columns)
    padded[..., :height, :width] = x
    out = module(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out, module(padded)[..., :height, :width])


def test_owners_are_the_largest_shares() -> None:
    torch.manual_seed(0)
    module, x = SuperTokenAttention(4, 1, 4), 3 * torch.randn(2, 4, 7, 12)
    _, shares, grid = module.assign(x)
    assert grid == (2, 3)
    owners = module.owners(x).view(2, 7, 12)
    for image, r, c in product(range(2), range(7), range(12)):
        cell = r // 4 * 3 + c // 4
        near = neighbours(r // 4, c // 4, grid)
        best = near[int(shares[image, cell, :, r % 4 * 4 + c % 4].argmax())]
        assert int(owners[image, r, c]) == (-1 if best is None else best)


def test_a_block_is_what_the_paper_draws() -> None:
    block = small(layer_scale=(0.5, None, None, None)).stages[0].blocks[0]  # type: ignore[union-attr]
    assert type(block.norm1) is LayerNorm2d
    assert block.norm1.eps == 1e-6
    assert type(block.norm2) is nn.BatchNorm2d
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        y = x + block.pos_embed(x)
        y = y + block.ls1.gamma.view(1, 8, 1, 1) * block.attn(block.norm1(y))
        hidden = nn.functional.gelu(block.mlp.fc1(block.norm2(y)))
        mixed = block.mlp.fc2(hidden + block.mlp.conv(hidden))
        y = y + block.ls2.gamma.view(1, 8, 1, 1) * mixed
        torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize(("name", "scaled"), [("svit_small", 0), ("svit_base", 20)])
def test_layer_scale_is_in_the_last_two_stages_of_the_larger_models(name: str, scaled: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found = [n for n, part in model.named_modules() if isinstance(part, LayerScale2d)]
    assert len(found) == 2 * scaled
    assert all(n.startswith(("stages.2", "stages.3")) for n in found)


def test_activation_comes_before_the_batch_norm_in_the_stem() -> None:
    kinds = [type(part) for part in small().stem]
    assert kinds == [nn.Conv2d, nn.GELU, nn.BatchNorm2d] * 4


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_stems_stride_is_an_argument(stride: int) -> None:
    model = small(stem_stride=stride, super_tokens=(4, 2, 1, 1))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model.stem(images).shape == (2, 8, 32 // stride, 32 // stride)
        maps = timm.create_model(
            "svit_small", **SMALL, stem_stride=stride, features_only=True
        ).eval()(images)
    assert [m.shape[1] for m in maps] == [8, 16, 24, 32]
    assert [m.shape[2] for m in maps] == [32 // stride // 2**i for i in range(4)]


def test_it_keeps_timms_conventions() -> None:
    model, images = small(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape == (2, model.num_features, 2, 2)
        logits = model(images)
        torch.testing.assert_close(model.forward_head(features), logits)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        torch.testing.assert_close(model.get_classifier()(pooled), logits)
    assert model.no_weight_decay() == set()
    assert timm.is_model("svit_large")
    assert model.pretrained_cfg["first_conv"] == "stem.0"  # type: ignore[index]
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert model(images).shape == (2, 1024)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, 1024, 2, 2)
    with pytest.raises(ConfigError, match="global_pool=max"):
        model.reset_classifier(3, "max")


def test_feature_maps_are_the_stages_outputs() -> None:
    model, images = small(), torch.randn(1, 3, 64, 64)
    wrapped = timm.create_model("svit_small", **SMALL, features_only=True).eval()
    assert wrapped.feature_info.channels() == [8, 16, 24, 32]  # type: ignore[union-attr]
    assert wrapped.feature_info.reduction() == [4, 8, 16, 32]  # type: ignore[union-attr]
    weights = {k.replace("stages.", "stages_").replace("stem.", "stem_"): v
               for k, v in model.state_dict().items() if not k.startswith("head")}  # fmt: skip
    wrapped.load_state_dict(weights)
    with torch.no_grad():
        x = model.stem(images)
        for stage, found in zip(model.stages, wrapped(images)):
            x = stage(x)
            torch.testing.assert_close(found, x)


def test_checkpointed_gradients_are_the_plain_ones() -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))

    plain = gradients()
    model.set_grad_checkpointing()
    for found, expected in zip(gradients(), plain):
        torch.testing.assert_close(found, expected)


def test_stochastic_depth_rises_linearly_over_the_blocks() -> None:
    model = small(drop_path_rate=0.4)
    rates = [part.drop_prob for part in model.modules() if isinstance(part, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_layers_are_grouped_by_depth() -> None:
    from timm.models import group_parameters  # type: ignore[attr-defined]

    model = small()
    groups = group_parameters(model, model.group_matcher())
    assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))
    assert any("stem" in name for name in groups[0])
    assert any("stages.0" in name for name in groups[1])


def exported(method: Svit) -> tuple[ImageFeatures, ReducedTokens]:
    parts = method.exports()
    features = next(part for part in parts if isinstance(part, ImageFeatures))
    return features, next(part for part in parts if isinstance(part, ReducedTokens))


def test_it_stands_beside_plain_attention_on_all_tokens() -> None:
    method = build("svit").eval()
    assert isinstance(method, Svit)
    features, reduction = exported(method)
    assert reduction.token_counts() == {"attention": [16, 4, 4], "mlp": [64, 16, 4]}
    assert not reduction.trained_plain
    reference = method.reference()
    shapes = {name: value.shape for name, value in reference.state_dict().items()}
    assert {name: value.shape for name, value in method.encoder.state_dict().items()} == shapes
    sizes = [m.size for m in reference.modules() if isinstance(m, SuperTokenAttention)]
    assert sizes == [1, 1, 1]
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(reduction.reduced(images), method.class_logits(images))
        assert reduction.plain(images).shape == (2, NUM_CLASSES)
        assert features.patch_features(images).shape == (2, 32, 2, 2)
        groups = dict(reduction.groups(images))
    assert groups.keys() == {"stage 1", "stage 2"}
    assert groups["stage 1"].shape == (2, 64)
    assert groups["stage 2"].max() <= 3


@pytest.mark.slow
def test_no_graph_breaks_under_compile() -> None:
    method = build("svit").eval()
    images = torch.rand(2, 3, 7, 7)  # padded in two stages
    # One graph; generating code for it is torch's business.
    compiled = torch.compile(method.class_logits, fullgraph=True, backend="aot_eager")  # type: ignore[call-overload]
    with torch.no_grad():
        expected = method.class_logits(images)  # type: ignore[operator]
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem_stride": 3}, r"method\.stem_stride=3 must be 1, 2 or 4"),
        ({"super_tokens": [8, 0, 1, 1]}, r"method\.super_tokens=\[8, 0, 1, 1\]"),
        ({"stage_depths": [1, 1]}, "stage_depths 2, the model's own 4"),
        (
            {"stage_dims": [8], "stage_depths": [1], "stage_heads": [3], "super_tokens": [2]},
            r"stage_dims=\[8\] must be multiples of stage_heads=\[3\]",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SvitConfig(**changes)


def test_another_backbone_is_refused() -> None:
    cfg = config("svit")
    encoder = replace(cfg.encoder, name="deit_tiny_patch16_224", dim=24, heads=3, patch_size=2)
    builder = EncoderBuilder({"encoder": encoder}, NUM_CLASSES, load_weights=False)
    with pytest.raises(ConfigError, match=r"not a VisionTransformer: encoder\.name=svit_small"):
        Svit(cfg.method, builder)
    assert PAPER.backbones == ("svit_small", "svit_base", "svit_large")
