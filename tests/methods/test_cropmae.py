"""CropMAE: the card's checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.contract.build import build, config, context, smoke_batch
from vlx.blocks.cross_decoder import CrossBlock
from vlx.commands.dry_run import measure
from vlx.config.compose import compose
from vlx.core.errors import ConfigError
from vlx.core.random import uniform
from vlx.data.views import make_views
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig
from vlx.engine.config import RunConfig
from vlx.engine.load import run_config
from vlx.methods.cropmae import Cropmae, CropmaeConfig, Strategy
from vlx.ops.augment import RandomResizedCrop
from vlx.ops.masking import num_kept, random_masking
from vlx.ops.targets import masked_patch_mse


def small_method(**method: object) -> Cropmae:
    """16 patches of 4 pixels; two are kept."""
    torch.manual_seed(0)
    encoder = EncoderConfig(
        name="vit_tiny_patch16_224", image_size=16, patch_size=4, dim=24, depth=2, heads=3
    )
    keys = {"mask_ratio": 0.87, "decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 2}
    cfg = CropmaeConfig(**{**keys, "decoder_mlp_dim": 32, **method})  # type: ignore[arg-type]
    return Cropmae(cfg, EncoderBuilder({"encoder": encoder}, 0))


def paper_run(size: str, **method: int) -> RunConfig:
    cfg = config("cropmae", "paper")
    sizes = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
    dim, depth, heads = sizes[size]
    encoder = replace(
        cfg.encoder, name=f"vit_{size}_patch16_224", dim=dim, depth=depth, heads=heads
    )
    return replace(cfg, encoder=encoder, method=replace(cfg.method, **method))


@pytest.mark.parametrize(
    ("size", "decoder", "trainable", "in_encoder"),
    [
        ("small", (256, 4, 8), 28_201_728, 21_590_016),
        ("base", (512, 8, 16), 120_068_864, 85_647_360),
        ("large", (1024, 12, 16), 456_143_616, 303_099_904),
    ],
)
def test_parameter_counts(size: str, decoder: tuple, trainable: int, in_encoder: int) -> None:
    keys = ("decoder_dim", "decoder_depth", "decoder_heads")
    cfg = paper_run(size, **dict(zip(keys, decoder)))
    with torch.device("meta"):
        method = Cropmae(cfg.method, EncoderBuilder({"encoder": cfg.encoder}, 0, False))

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    assert count(method) == trainable
    assert count(method.encoder) == in_encoder
    if size == "small":
        assert sum(p.numel() for p in method.parameters()) == 28_327_808


# The card embeds all 196 patches of the masked view; here only the 2 kept ones are. In GMACs.
NOT_EMBEDDED = 194 * (3 * 16 * 16) * 384 / 1e9


def test_tokens_and_cost() -> None:
    report = measure(config("cropmae", "paper"))
    assert sorted(report.tokens["encoder.vit.blocks"]) == [3] * 12 + [197] * 12
    assert report.tokens["decoder.blocks"] == [197] * 4
    assert report.gmacs == pytest.approx(6.18 - NOT_EMBEDDED, abs=0.01)


def test_cost_of_the_parts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    cfg = config("cropmae", "paper")
    with torch.device("meta"):
        method = Cropmae(cfg.method, EncoderBuilder({"encoder": cfg.encoder}, 0, False))
        images = torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as whole:
            memory = method.remember(images)
        keep, restore = torch.empty(2, 1, 2).long()[0], torch.empty(1, 196).long()
        with FlopCounterMode(display=False) as local:
            out = method.encoder(images, keep=keep, normalised=True)
        with FlopCounterMode(display=False) as decoder:
            method.decoder(memory, out.prefix, out.tokens, restore)
    assert whole.get_total_flops() / 2e9 == pytest.approx(4.598, abs=0.002)
    assert local.get_total_flops() / 2e9 == pytest.approx(0.122 - NOT_EMBEDDED, abs=0.002)
    assert decoder.get_total_flops() / 2e9 == pytest.approx(1.457, abs=0.002)


def test_two_of_196_patches_are_kept_and_of_64_none() -> None:
    assert num_kept(196, 0.985) == 2
    assert num_kept(784, 0.985) == 11
    assert num_kept(196, 0.95) == 9
    assert random_masking(torch.rand(4, 196), 0.985).mask.sum(1).tolist() == [194] * 4
    with pytest.raises(ConfigError, match=r"mask_ratio=0\.985 keeps 0 of 64"):
        num_kept(64, 0.985)


def predict(method: Cropmae, memory: Tensor, masked: Tensor) -> Tensor:
    return method.predict(method.remember(memory), masked, context())[0]


def test_the_prediction_depends_on_one_patch_of_the_memory() -> None:
    method = small_method().eval()
    memory, masked = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    other = memory.clone()
    other[:, :, 4:8, 8:12] += 1.0
    assert not torch.allclose(predict(method, memory, masked), predict(method, other, masked))


def test_hidden_pixels_of_the_masked_view_do_not_matter() -> None:
    from vlx.ops.patches import upsample_mask

    method = small_method().eval()
    memory, masked = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    pred, mask = method.predict(method.remember(memory), masked, context())
    changed = masked.masked_fill(upsample_mask(mask, 4, (4, 4)), 7.0)
    assert torch.equal(pred, predict(method, memory, changed))


def test_no_gradient_on_the_prediction_at_visible_patches() -> None:
    method = small_method()
    pred, mask = method.predict(
        method.remember(torch.rand(2, 3, 16, 16)), torch.rand(2, 3, 16, 16), context()
    )
    pred.retain_grad()
    masked_patch_mse(pred, torch.rand_like(pred), mask).backward()
    assert pred.grad is not None
    assert not pred.grad[~mask].any()
    assert (pred.grad[mask] != 0).any(-1).all()


def test_the_memory_has_no_position_of_its_own() -> None:
    method = small_method().eval()
    memory = method.remember(torch.rand(2, 3, 16, 16))
    masked = torch.rand(2, 3, 16, 16)
    order = torch.randperm(17)
    pred, _ = method.predict(memory, masked, context())
    shuffled, _ = method.predict(memory[:, order], masked, context())
    torch.testing.assert_close(pred, shuffled, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_encoder_through_both_views() -> None:
    method = small_method(dropout=0.0)
    memory = torch.rand(2, 3, 16, 16, requires_grad=True)
    masked = torch.rand(2, 3, 16, 16, requires_grad=True)
    pred, _ = method.predict(method.remember(memory), masked, context())
    pred.sum().backward()
    assert memory.grad is not None
    assert memory.grad.any()
    assert masked.grad is not None
    assert masked.grad.any()


def test_eval_repeats_bit_for_bit_and_dropout_does_not() -> None:
    method = small_method()
    memory, masked = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    torch.manual_seed(0)
    first, second = predict(method, memory, masked), predict(method, memory, masked)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(predict(method, memory, masked), first)
    method.eval()
    assert torch.equal(predict(method, memory, masked), predict(method, memory, masked))


def test_the_block_is_cross_mlp_self_each_normalised_after() -> None:
    torch.manual_seed(0)
    block = CrossBlock(8, 2, mlp_dim=16, dropout=0.0)
    queries, memory = torch.rand(2, 5, 8), torch.rand(2, 7, 8)

    def attend(layer: nn.MultiheadAttention, q: Tensor, kv: Tensor) -> Tensor:
        w, b = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
        split = [(x @ w[i].T + b[i]).unflatten(2, (2, 4)) for i, x in enumerate((q, kv, kv))]
        q, k, v = (x.transpose(1, 2) for x in split)
        mixed = (q @ k.transpose(2, 3) / 2.0).softmax(-1) @ v
        return layer.out_proj(mixed.transpose(1, 2).flatten(2))

    x = block.norm_cross(queries + attend(block.cross_attn, queries, memory))
    x = block.norm_mlp(x + block.fc2(nn.functional.gelu(block.fc1(x))))
    x = block.norm_self(x + attend(block.self_attn, x, x))
    torch.testing.assert_close(block(queries, memory), x, atol=1e-5, rtol=1e-5)


def test_the_local_box_lies_in_the_resized_global_view_with_its_share_of_area() -> None:
    cfg = CropmaeConfig()
    crop = RandomResizedCrop(scale=(cfg.local_scale[0], cfg.local_scale[1]))
    u = uniform(torch.arange(500), crop.draws)
    boxes = crop.boxes(torch.full((500, 2), 224), u)
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 224).all()
    assert (left + width <= 224).all()
    share = height * width / 224**2
    assert share.min() > 0.29
    assert share.max() < 0.61


def views(strategy: Strategy, **method: object) -> dict[str, Tensor]:
    cfg = CropmaeConfig(strategy=strategy, **method)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 24, 24), generator=generator, dtype=torch.uint8)
    sizes = torch.full((32, 2), 24)
    return make_views(images, sizes, torch.arange(32), Cropmae.needs(cfg).views, 16)


def test_views_of_the_strategies() -> None:
    plain = {s: views(s, flip=0.0) for s in Strategy}
    assert all(v.keys() == {"memory", "masked"} for v in plain.values())
    there, back = plain[Strategy.GlobalToLocal], plain[Strategy.LocalToGlobal]
    assert torch.equal(there["memory"], back["masked"])  # the global view
    same, random = plain[Strategy.SameViews], plain[Strategy.RandomViews]
    assert torch.equal(same["memory"], same["masked"])
    assert not torch.allclose(random["memory"], random["masked"])
    flipped = views(Strategy.SameViews)
    assert torch.equal(flipped["memory"], flipped["masked"])  # the flip is shared too


def test_flips_of_the_two_views_are_independent() -> None:
    plain, flipped = views(Strategy.GlobalToLocal, flip=0.0), views(Strategy.GlobalToLocal)
    turned = {
        name: (plain[name] != flipped[name]).flatten(1).any(1) for name in ("memory", "masked")
    }
    both = turned["memory"] & turned["masked"]
    for name in turned:
        assert 0 < turned[name].sum() < 32
    assert both.sum() not in (turned["memory"].sum(), turned["masked"].sum())


def test_the_local_view_is_cut_from_the_global_view() -> None:
    """A picture whose left half is black: a local crop of a black global view is black."""
    cfg = CropmaeConfig(flip=0.0, global_scale=[0.1, 0.2])
    images = torch.zeros(64, 3, 24, 24, dtype=torch.uint8)
    images[..., 12:] = 255
    made = make_views(
        images, torch.full((64, 2), 24), torch.arange(64), Cropmae.needs(cfg).views, 16
    )
    black = made["memory"].flatten(1).amax(1) == 0
    assert black.any()
    assert made["masked"][black].abs().max() == 0


def test_siammae_preset_is_the_baselines_head_and_ratio() -> None:
    cfg = run_config(compose("cropmae", "pretrain-mim", "siammae"))
    assert cfg.method.strategy is Strategy.SameViews
    assert num_kept(196, cfg.method.mask_ratio) == 9


def test_the_smoke_loss_is_the_masked_mean_of_normalised_patches() -> None:
    from vlx.ops.patches import patchify

    method = build("cropmae").eval()
    batch = smoke_batch("cropmae")
    loss = method.step(batch, context()).losses["recon"]
    masked = method.encoder.normalise(batch["masked"])
    memory = method.remember(method.encoder.normalise(batch["memory"]))
    pred, mask = method.predict(memory, masked, context())
    patches = patchify(masked, 2)
    terms = []
    for b, n in mask.nonzero().tolist():
        mean, var = patches[b, n].mean(), patches[b, n].var()
        terms.append((pred[b, n] - (patches[b, n] - mean) / (var + 1e-6).sqrt()).square().mean())
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)
