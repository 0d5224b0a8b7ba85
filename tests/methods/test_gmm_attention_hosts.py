"""GMM attention on the paper's other hosts: Swin, CaiT, PiT and T2T-ViT."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.contract.build import NUM_CLASSES, batch_for, config, context
from vlx.core.errors import ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.methods.gmm_attention import GmmAttention
from vlx.methods.gmm_attention._cait import ClassBlock
from vlx.methods.gmm_attention._mask import GaussianMixture, MaskedAttention
from vlx.methods.gmm_attention._swin import MaskedWindowAttention
from vlx.methods.gmm_attention._t2t import ResidualAttention, TokenTransformer, soft_split


class Figures(NamedTuple):
    released: int
    """Trainable parameters of the released code's model without a mask, ten classes."""
    left_out: int
    """Of these, what is not here."""
    readme: float
    """Parameters of the readme's table, in millions."""
    macs: int
    """The released model's, without the products of attention."""
    readme_macs: float
    """In millions; the readme's counter leaves these products out and has the norms."""
    layers: list[tuple[int, int]]
    """Heads, and places of the grid, of the layers that have a mask."""


HOSTS = {
    "swin_patch2_32": Figures(
        7_073_188, 0, 7.1, 236_228_352, 236.9, [(3, 16)] * 2 + [(6, 16)] * 6 + [(12, 16)] * 4
    ),
    "cait_patch4_32": Figures(5_078_834, 0, 5.1, 304_958_520, 305.9, [(4, 64)] * 24),
    # Without the class token's row of the position table.
    "pit_patch2_32": Figures(
        6_972_586, 96, 7.0, 238_403_328, 239.1, [(2, 256)] * 2 + [(4, 64)] * 6 + [(8, 16)] * 4
    ),
    # Without a class token and a norm of 576 that nothing reads.
    "t2t_patch4_32": Figures(
        6_486_080, 256 + 2 * 576, 6.5, 416_565_760, 417.4, [(1, 256)] + [(4, 64)] * 12
    ),
}
SMALL = {
    "swin_patch2_32": {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)},
    "cait_patch4_32": {
        "embed_dim": 24, "depth": 2, "num_heads": 3, "head_dim": 8, "mlp_dim": 32,
    },
    "pit_patch2_32": {"base_dims": (8, 8, 8), "depth": (1, 2, 1), "heads": (1, 2, 4)},
    "t2t_patch4_32": {"embed_dim": 24, "depth": 3, "num_heads": 3, "token_dim": 8},
}  # fmt: skip

each_host = pytest.mark.parametrize("host", HOSTS)


def create(name: str, **more):
    """A small one: 8x8 places at first, in Swin and PiT; 4x4 in CaiT and, at last, T2T."""
    torch.manual_seed(0)
    sizes = SMALL[name.partition("_")[2]]
    model = timm.create_model(name, **{"img_size": 16, "num_classes": 5, **sizes, **more})
    return model.eval()


def masks_of(model: nn.Module) -> list[GaussianMixture]:
    return [part for part in model.modules() if isinstance(part, GaussianMixture)]


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["small", "gmm"])
@each_host
def test_parameters_and_macs_are_the_released_codes_and_the_papers(host: str, kind: str) -> None:
    figures = HOSTS[host]
    with torch.device("meta"):
        model = timm.create_model(f"{kind}_{host}", num_classes=10).eval()
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            model.requires_grad_(False)(torch.empty(1, 3, 32, 32))
    gaussians = 2 * 5 * sum(heads for heads, _ in figures.layers) if kind == "gmm" else 0
    assert count == figures.released - figures.left_out + gaussians
    assert count / 1e6 == pytest.approx(figures.readme, rel=0.005)
    products = flops.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    macs = (flops.get_total_flops() - products) // 2
    assert macs == figures.macs
    assert macs / 1e6 == pytest.approx(figures.readme_macs, rel=0.005)


@each_host
def test_every_layer_has_a_mask_of_its_heads_and_grid(host: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"gmm_{host}")
    found = [(mask.sigma.shape[1], len(mask.squared)) for mask in masks_of(model)]
    assert found == HOSTS[host].layers


@each_host
def test_images_that_are_not_square(host: str) -> None:
    with torch.device("meta"), torch.no_grad():
        images = torch.empty(2, 3, 32, 16)
        assert create(f"gmm_{host}", img_size=(32, 16))(images).shape == (2, 5)


# --- masks ---------------------------------------------------------------------------------------


@each_host
def test_wide_gaussians_of_amplitude_one_are_the_plain_host(host: str) -> None:
    masked, plain = create(f"gmm_{host}", num_kernels=1), create(f"small_{host}")
    for part in masked.modules():
        if isinstance(part, nn.Linear):  # so that attention is far from uniform
            nn.init.xavier_normal_(part.weight)
    state = masked.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert not torch.allclose(masked(images), plain(images), atol=1e-4)
        for mask in masks_of(masked):
            mask.sigma.fill_(1e4)
            mask.alpha.fill_(1.0)
        torch.testing.assert_close(masked(images), plain(images), rtol=1e-5, atol=1e-5)


@each_host
def test_all_of_a_host_is_trained_masks_too(host: str) -> None:
    model = create(f"gmm_{host}").train()
    model(torch.rand(4, 3, 16, 16)).square().sum().backward()
    still = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert param.grad is not None, name
            still += [name] * (not param.grad.any())
    last = "transformers.2.blocks.0.attn.mask"  # PiT's: only the class token is read after it
    assert still == [f"{last}.sigma", f"{last}.alpha"] * host.startswith("pit")


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def test_swin_multiplies_before_positions_and_the_mask_of_shifts_are_added() -> None:
    model = create("gmm_swin_patch2_32")
    block = model.layers[0].blocks[1]
    attn, shifted = block.attn, block.attn_mask
    assert isinstance(attn, MaskedWindowAttention)
    x = torch.randn(2 * 4, 16, 16)  # two images of four windows
    with torch.no_grad():
        attn.relative_position_bias_table.normal_()
        q, k, v = (heads_of(part, 1) for part in attn.qkv(x).chunk(3, dim=-1))
        expected = []
        for window in range(8):
            logits = attn.multiplier() * (q[window] @ k[window].mT / 16**0.5)
            table = attn.relative_position_bias_table[attn.relative_position_index]
            weights = (logits + table.permute(2, 0, 1) + shifted[window % 4]).softmax(-1)
            expected.append(attn.proj((weights @ v[window]).squeeze(0)))
        assert (shifted < 0).any()
        found = attn(x, mask=shifted)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_cait_multiplies_before_the_heads_talk() -> None:
    attn = create("gmm_cait_patch4_32").blocks[0].attn
    x = torch.randn(2, 16, 24)
    with torch.no_grad():
        q, k, v = (heads_of(part, 3) for part in (attn.q(x), *attn.kv(x).chunk(2, dim=-1)))
        logits = attn.mask() * (q @ k.mT / 8**0.5)
        mixed = (attn.mix_logits.T @ logits.flatten(2)).view_as(logits)
        weights = (attn.mix_weights.T @ mixed.softmax(-1).flatten(2)).view_as(logits)
        expected = attn.proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attn(x), expected)


def test_pit_leaves_the_class_tokens_row_and_column_as_they_are() -> None:
    attn = create("gmm_pit_patch2_32").transformers[0].blocks[0].attn
    assert isinstance(attn, MaskedAttention)
    x = torch.randn(2, 1 + 64, 8)
    with torch.no_grad():
        q, k, v = (heads_of(part, 1) for part in attn.qkv(x).chunk(3, dim=-1))
        logits = q @ k.mT / 8**0.5
        logits[:, :, 1:, 1:] *= attn.mask()
        expected = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attn(x), expected)


def test_t2t_masks_its_first_layer_whose_values_are_the_residual() -> None:
    torch.manual_seed(0)
    layer = TokenTransformer(27, 8, GaussianMixture(1, (8, 8), num_kernels=5))
    x = torch.randn(2, 64, 27)
    with torch.no_grad():
        q, k, v = layer.qkv(layer.norm1(x)).chunk(3, dim=-1)
        weights = (layer.mask()[0] * (q @ k.mT / 27**0.5)).softmax(-1)
        attended = v + layer.proj(weights @ v)
        torch.testing.assert_close(layer(x), attended + layer.mlp(layer.norm2(attended)))


# --- hosts ---------------------------------------------------------------------------------------


def test_swin_adds_a_position_to_the_normed_patches() -> None:
    model = create("small_swin_patch2_32")
    images, patches = torch.rand(2, 3, 16, 16), model.patch_embed
    assert patches.pos_embed.shape == (1, 8, 8, 16)
    with torch.no_grad():
        bare = patches.norm(patches.proj(images).permute(0, 2, 3, 1))
        torch.testing.assert_close(patches(images), bare + patches.pos_embed)


def test_caits_class_token_attends_to_the_patches_as_they_are() -> None:
    block = create("gmm_cait_patch4_32").blocks_token_only[0]
    assert isinstance(block, ClassBlock)
    assert block.attn.mask is None
    attn, patches, token = block.attn, torch.randn(2, 16, 24), torch.randn(2, 1, 24)
    with torch.no_grad():
        q = heads_of(attn.q(block.norm1(token)), 3)
        k, v = (heads_of(part, 3) for part in attn.kv(patches).chunk(2, dim=-1))
        logits = q @ k.mT / 8**0.5
        mixed = (attn.mix_logits.T @ logits.flatten(2)).view_as(logits)
        weights = (attn.mix_weights.T @ mixed.softmax(-1).flatten(2)).view_as(logits)
        attended = token + 0.1 * attn.proj((weights @ v).transpose(1, 2).flatten(2))
        expected = attended + 0.1 * block.mlp(block.norm2(attended))
        torch.testing.assert_close(block(patches, token), expected)


def test_caits_layer_scale_starts_by_depth() -> None:
    model = create("gmm_cait_patch4_32", depth=26)
    for part in ("gamma_1", "gamma_2"):
        scales = [float(getattr(block, part)[0]) for block in model.blocks]
        assert scales == pytest.approx([0.1] * 18 + [1e-5] * 6 + [1e-6] * 2)


def test_pit_pools_by_a_depthwise_and_a_1x1_convolution() -> None:
    model = create("gmm_pit_patch2_32")
    pool = model.transformers[1].pool
    depthwise, pointwise = pool.conv
    assert (depthwise.groups, depthwise.kernel_size, depthwise.stride) == (8, (3, 3), (2, 2))
    assert (pointwise.in_channels, pointwise.out_channels, pointwise.kernel_size) == (
        16,
        16,
        (1, 1),
    )
    maps, token = pool(torch.randn(2, 8, 8, 8), torch.randn(2, 1, 8))
    assert maps.shape == (2, 16, 4, 4)
    assert token.shape == (2, 1, 16)


def test_t2t_blocks_add_the_normed_tokens_once_more() -> None:
    block = create("small_t2t_patch4_32").blocks[0]
    assert isinstance(block, Block)
    assert isinstance(block.attn, ResidualAttention)
    x = torch.randn(2, 16, 24)
    with torch.no_grad():
        normed = block.norm1(x)
        attended = x + normed + MaskedAttention.forward(block.attn, normed)
        torch.testing.assert_close(block(x), attended + block.mlp(block.norm2(attended)))


def test_a_soft_split_is_a_3x3_window_at_every_second_place() -> None:
    maps = torch.randn(1, 2, 6, 8)
    tokens = soft_split(maps)
    assert tokens.shape == (1, 3 * 4, 2 * 9)
    window = maps[0, :, 1:4, 3:6]  # around row 2, column 4
    torch.testing.assert_close(tokens[0, 1 * 4 + 2], window.flatten())


def test_t2t_splits_once_for_every_halving_and_places_tokens_by_a_fixed_table() -> None:
    for patch, layers in ((2, 0), (4, 1), (8, 2)):
        model = create("gmm_t2t_patch4_32", patch_size=patch)
        side = 16 // patch
        grids = [len(layer.mask.squared) for layer in model.patch_embed.layers]
        assert grids == [64, 16][:layers]
        assert model.patch_embed(torch.rand(2, 3, 16, 16)).shape == (2, side * side, 24)
    table = create("gmm_t2t_patch4_32").pos_embed
    assert not table.requires_grad
    for column in range(12):
        angles = torch.arange(16) / 10000 ** (2 * column / 24)
        torch.testing.assert_close(table[0, :, column], angles.sin())
        torch.testing.assert_close(table[0, :, 12 + column], angles.cos())


def test_t2t_norms_every_token_and_averages() -> None:
    model, images = create("gmm_t2t_patch4_32"), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        tokens = model.forward_features(images)
        torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
        torch.testing.assert_close(model(images), model.head(tokens.mean(1)))


@each_host
def test_stochastic_depth_is_level_in_cait_and_pit_and_rises_in_swin_and_t2t(host: str) -> None:
    model = create(f"gmm_{host}", drop_path_rate=0.3)
    rates = [part.drop_prob for part in model.modules() if type(part).__name__ == "DropPath"]
    if host.startswith(("cait", "pit")):
        assert rates == [0.3] * {"cait": 2 + 2, "pit": 2 * 4}[host.partition("_")[0]]
    else:
        assert rates == sorted(rates)
        assert rates[-1] == pytest.approx(0.3)
        assert rates[0] < 0.3


@each_host
def test_initial_positions(host: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(f"gmm_{host}")
    if host.startswith("swin"):
        assert float(model.patch_embed.pos_embed.std()) == pytest.approx(0.02, rel=0.03)
    elif not host.startswith("t2t"):
        assert float(model.pos_embed.std()) == pytest.approx(1.0, rel=0.03)


def test_a_host_has_one_size_of_images() -> None:
    for host in ("vit_patch4_32", "swin_patch2_32", "t2t_patch4_32"):
        with torch.device("meta"):
            model = timm.create_model(f"gmm_{host}")
        with pytest.raises(ConfigError, match="made for one grid: give img_size"):
            model.set_input_size((64, 64))  # type: ignore[operator]


@pytest.mark.parametrize(("patch", "size"), [(3, 24), (1, 16), (8, 20)])
def test_patches_that_t2t_cannot_reach_by_halving_are_refused(patch: int, size: int) -> None:
    with pytest.raises(ConfigError, match=rf"encoder.patch_size={patch} must be a power of 2"):
        create("gmm_t2t_patch4_32", patch_size=patch, img_size=size)


@each_host
def test_the_method_trains_all_of_a_host_and_sets_its_number_of_gaussians(host: str) -> None:
    cfg, own = config("gmm-attention"), {"patch_size": None, "dim": None, "depth": None}
    encoder = replace(cfg.encoder, name=f"gmm_{host}", image_size=32, heads=None, **own)
    builder = EncoderBuilder({"encoder": encoder}, NUM_CLASSES)
    method = GmmAttention(replace(cfg.method, num_kernels=2), builder)
    masks = masks_of(method.encoder.backbone)
    assert {len(mask.sigma) for mask in masks} == {2}
    batch = batch_for(GmmAttention.needs(cfg.method), 32, batch_size=2)
    loss = method.step(batch, context()).losses["class"]
    loss.backward()
    assert torch.isfinite(loss)
    trained = [param for _, param in method.param_groups()[0].params]
    assert all(param.grad is not None for param in trained)
    assert len(trained) == sum(p.requires_grad for p in method.parameters())
