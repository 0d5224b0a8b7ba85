"""GMML: the card's checks, and the corruption against a plain loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.contract.build import build, config, context, smoke_batch
from vlx.blocks.reconstruction_head import ReconstructionHead
from vlx.commands.dry_run import measure
from vlx.core.errors import ConfigError
from vlx.core.random import uniform
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig
from vlx.families.configs.group_masking import Corruption
from vlx.methods.gmml import Gmml, GmmlConfig
from vlx.ops.corrupt import draw_rectangles, group_partner, shift_filler, union_mask
from vlx.ops.gradients import clip_each


def small_method(**method: object) -> Gmml:
    """32 pixels in 4x4 patches of 8, two blocks."""
    torch.manual_seed(0)
    encoder = EncoderConfig(
        name="vit_tiny_patch16_224", image_size=32, patch_size=8, dim=24, depth=2, heads=3
    )
    cfg = GmmlConfig(**{"taps": [1, 2], **method})  # type: ignore[arg-type]
    return Gmml(cfg, EncoderBuilder({"encoder": encoder}, 0))


def pair(size: int = 32, count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(count, 3, size, size, generator=generator) for name in ("first", "second")
    }


@pytest.mark.parametrize(
    ("size", "dim", "heads", "encoder_params", "head_params", "gmacs"),
    [
        ("tiny", 192, 3, 5_524_416, 258_627, None),
        ("small", 384, 6, 21_665_664, 738_435, 4.598 + 0.145),
        ("base", 768, 12, 85_798_656, 2_361_603, 17.563 + 0.462),
    ],
)
def test_parameter_counts_and_cost(
    size: str, dim: int, heads: int, encoder_params: int, head_params: int, gmacs: float | None
) -> None:
    cfg = config("gmml", "paper")
    name = f"vit_{size}_patch16_224"
    cfg = replace(cfg, encoder=replace(cfg.encoder, name=name, dim=dim, heads=heads))
    report = measure(cfg)
    assert report.total_params == report.trainable_params == encoder_params + head_params
    if gmacs is not None:
        assert report.gmacs == pytest.approx(2 * gmacs, abs=0.01)  # two views a sample
    assert report.tokens["encoder.vit.blocks"] == [197] * 12


def test_the_head_alone_has_the_published_size() -> None:
    head = ReconstructionHead(384, 16, (14, 14))
    assert sum(p.numel() for p in head.parameters()) == 738_435


def reference_mask(u: Tensor, share: float, size: int, align: int, largest: float) -> Tensor:
    """The source's loop, fed with our uniforms instead of numpy's."""
    mask, bound = torch.zeros(size, size, dtype=torch.bool), int(size * largest)
    rows, columns, heights, widths = u.reshape(4, -1).tolist()
    for number in range(len(rows)):
        if mask.sum() >= share * size * size:
            break
        top = int(rows[number] * (size - align)) // align * align
        left = int(columns[number] * (size - align)) // align * align
        height = min(align + int(heights[number] * (bound - align)), size - top)
        width = min(align + int(widths[number] * (bound - align)), size - left)
        height, width = round(height / align) * align, round(width / align) * align
        mask[top : top + height, left : left + width] = True
    return mask


@pytest.mark.parametrize(("size", "align"), [(32, 1), (32, 4), (30, 4), (48, 8)])
def test_the_batched_union_equals_the_sources_loop(size: int, align: int) -> None:
    u = uniform(torch.arange(12) + size, 4 * 128)
    share = torch.linspace(0.3, 0.75, 12)
    masks = union_mask(u, share, size, align=align, largest=0.3)
    for row in range(12):
        expected = reference_mask(u[row], share[row].item(), size, align, 0.3)
        assert torch.equal(masks[row, 0], expected), row


@pytest.mark.parametrize(
    ("size", "align", "low", "high", "expected", "touched", "whole"),
    [
        (224, 1, 0.5, 0.75, 0.645, 0.87, 0.36),
        (224, 16, 0.5, 0.75, 0.63, None, None),
        (224, 1, 0.3, 0.3, 0.31, 0.54, 0.13),
        (32, 4, 0.5, 0.75, 0.643, None, None),
        (32, 4, 0.3, 0.3, 0.325, None, None),
    ],
)
def test_destroyed_area_as_simulated_from_the_source(
    size: int, align: int, low: float, high: float, expected: float, touched: float | None, whole
) -> None:
    count = 64 if size == 224 else 1000
    share = torch.linspace(low, high, count)
    u = uniform(torch.arange(count) + 7, 4 * 128)
    mask = union_mask(u, share, size, align=align, largest=0.3)
    assert (mask.float().mean((1, 2, 3)) >= share - 1e-6).all()  # 128 rectangles suffice
    assert mask.float().mean().item() == pytest.approx(expected, abs=0.015)
    if touched is not None:
        patches = mask.float().unfold(2, 16, 16).unfold(3, 16, 16).flatten(4).mean(-1)
        assert (patches > 0).float().mean().item() == pytest.approx(touched, abs=0.025)
        assert (patches == 1).float().mean().item() == pytest.approx(whole, abs=0.03)


def test_an_alignment_that_leaves_no_side_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.align=16 must be .* = 9"):
        draw_rectangles(torch.rand(2, 40), 32, align=16, largest=0.3)


def test_pixels_outside_the_mask_are_the_clean_ones_bit_for_bit() -> None:
    method = small_method()
    clean = pair()["first"]
    corrupted, mask = method.destroy(clean, context(), "first")
    outside = ~mask.expand_as(clean)
    assert torch.equal(corrupted[outside], clean[outside])
    assert (corrupted[mask.expand_as(clean)] != clean[mask.expand_as(clean)]).float().mean() > 0.99


def test_half_of_the_images_carry_noise_over_more_than_half_and_half_aliens_over_less() -> None:
    method = small_method()
    clean = torch.rand(400, 3, 32, 32)
    corrupted, mask = method.destroy(clean, context(), "first")
    area = mask.float().mean((1, 2, 3))
    alien = area < 0.45
    assert alien.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert area[alien].min() >= 0.3
    assert area[~alien].min() >= 0.5
    written = corrupted[mask.expand_as(clean)]
    assert written.min() < -1.0  # noise
    values = corrupted[alien][mask[alien].expand(-1, 3, -1, -1)]
    assert values.min() >= 0.0  # pixels of another image
    assert values.max() <= 1.0


def test_types_are_drawn_per_image_and_aliens_get_rarer() -> None:
    method = small_method(corruptions=[Corruption.noise, Corruption.zeros, Corruption.shift])
    clean = 2.0 + torch.rand(300, 3, 32, 32)
    corrupted, mask = method.destroy(clean, context(), "first")
    area = mask.float().mean((1, 2, 3))
    inside = mask.expand_as(clean)
    own = area >= 0.5
    zeros = torch.tensor([bool((c[m] == 0).all()) for c, m in zip(corrupted, inside)])
    assert own.float().mean().item() == pytest.approx(0.75, abs=0.08)  # aliens: 1 in 4
    assert zeros.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert not zeros[~own].any()


def test_the_shifted_image_is_made_of_its_own_pixels_in_other_places() -> None:
    clean = torch.arange(2 * 3 * 16, dtype=torch.float32).reshape(2, 3, 4, 4)
    moved = shift_filler(clean, clean, torch.tensor([[0.0, 0.0], [0.5, 0.9]]))
    assert torch.equal(moved[0], clean[0].roll((-1, -1), (1, 2)))
    assert torch.equal(moved[1], clean[1].roll((-2, -3), (1, 2)))


def test_an_alien_that_is_the_image_itself_changes_nothing_though_its_mask_is_set() -> None:
    method = small_method()
    clean = torch.rand(1, 3, 32, 32).expand(8, -1, -1, -1)
    corrupted, mask = method.destroy(clean, context(), "first")
    alien = mask.float().mean((1, 2, 3)) < 0.45
    assert alien.any()
    assert mask[alien].any()
    assert torch.equal(corrupted[alien], clean[alien])


def test_partners_are_others_of_the_own_group_and_do_not_change_with_the_split() -> None:
    u = uniform(torch.arange(64), 1)[:, 0]
    whole = group_partner(u, 0, 4)
    assert (whole != torch.arange(64)).all()
    assert torch.equal(whole // 4, torch.arange(64) // 4)
    parts = torch.cat([group_partner(u[s : s + 16], s, 4) + s for s in range(0, 64, 16)])
    assert torch.equal(whole, parts)


def test_zero_gradient_on_the_prediction_outside_the_mask() -> None:
    method = small_method()
    kept: list[Tensor] = []

    def keep(module, args, out: Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    method.head.register_forward_hook(keep)
    batch = pair()
    method.step(batch, context()).losses["recon"].backward()
    views = [method.encoder.normalise(batch[name]) for name in batch]
    pairs = [method.destroy(v, context(), n) for v, n in zip(views, batch)]
    mask = torch.cat([m for _, m in pairs]).expand(8, 3, 32, 32)
    (pred,) = kept
    assert pred.grad is not None
    assert not pred.grad[~mask].any()
    assert pred.grad[mask].all()


def test_a_prediction_of_zero_costs_the_mean_clean_value_on_the_mask() -> None:
    method = small_method()
    torch.nn.init.zeros_(method.head.to_pixels.weight)
    torch.nn.init.zeros_(method.head.to_pixels.bias)  # type: ignore[arg-type]
    batch = pair()
    out = method.step(batch, context())
    total, count = torch.zeros(()), 0
    for name, images in batch.items():
        clean = method.encoder.normalise(images)
        _, mask = method.destroy(clean, context(), name)
        total += clean[mask.expand_as(clean)].abs().sum()
        count += int(mask.sum()) * 3
    torch.testing.assert_close(out.losses["recon"], total / count)
    assert method.counts(batch, context())["recon"] == count


def test_the_loss_can_count_every_pixel() -> None:
    counts = small_method(drop_only=False).counts(pair(), context())
    assert counts["recon"] == 2 * 4 * 3 * 32 * 32


def test_the_two_views_do_not_interact_and_are_corrupted_apart() -> None:
    method = small_method()
    batch = pair()
    same = {"first": batch["first"], "second": batch["first"]}
    clean = method.encoder.normalise(batch["first"])
    first, _ = method.destroy(clean, context(), "first")
    second, _ = method.destroy(clean, context(), "second")
    assert not torch.equal(first, second)
    whole = method.predict(torch.cat([first, second]))
    torch.testing.assert_close(whole[:4], method.predict(first), atol=1e-5, rtol=1e-4)
    assert method.step(same, context()).losses["recon"].isfinite()


def test_the_head_reads_the_mean_of_the_taps_normed_once() -> None:
    method = small_method().eval()
    x = torch.rand(2, 3, 32, 32)
    layers = method.encoder(x, layers=(1, 2), normalised=True).layers
    tokens = method.encoder.vit.norm((layers[1] + layers[2]) / 2)[:, 1:]
    torch.testing.assert_close(method.predict(x), method.head(tokens))


def test_the_transposed_convolution_paints_channel_first_patches() -> None:
    head = ReconstructionHead(6, 4, (2, 3))
    tokens = torch.rand(2, 6, 6)
    weight = head.to_pixels.weight.flatten(1)  # (D, 3*p*p)
    assert head.to_pixels.bias is not None
    pixels = (head.mlp(tokens) @ weight).reshape(2, 2, 3, 3, 4, 4)
    expected = pixels.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 8, 12)
    expected = expected + head.to_pixels.bias[:, None, None]
    torch.testing.assert_close(head(tokens), expected)


@pytest.mark.parametrize("taps", [[], [1], [0, 2], [2, 3]])
def test_taps_must_hold_the_last_block(taps: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"method\.taps="):
        small_method(taps=taps)


def test_each_tensor_is_clipped_on_its_own() -> None:
    small, large = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    small.grad, large.grad = torch.full((4,), 0.5), torch.full((4,), 50.0)
    clip_each([small, large], 3.0)
    torch.testing.assert_close(small.grad, torch.full((4,), 0.5))
    torch.testing.assert_close(large.grad.norm(), torch.tensor(3.0))


def test_gradients_are_clipped_before_the_update() -> None:
    method = small_method(clip_each=1e-3)
    (method.step(pair(), context()).losses["recon"] * 100).backward()
    method.before_update(context())
    norms = [p.grad.norm() for p in method.parameters() if p.grad is not None]
    assert torch.stack(norms).max() <= 1.001e-3


def test_weight_decay_rises_from_004_to_04() -> None:
    from vlx.engine.schedule import Rates

    cfg = config("gmml", "paper")
    rates = Rates(cfg.schedule, 5e-4, cfg.optim.weight_decay, 1000, 10)
    assert rates.decay(0) == pytest.approx(0.04)
    assert rates.decay(500) == pytest.approx(0.22)
    assert rates.decay(1000) == pytest.approx(0.4)


def test_the_loss_of_a_batch_does_not_depend_on_its_split_even_with_aliens() -> None:
    """Aliens couple samples in the input; within groups of four the split is exact."""
    method = build("gmml").eval()
    batch = smoke_batch("gmml", batch_size=16)
    whole = method.step(batch, context())
    total, count = torch.zeros(()), torch.zeros(())
    for offset in range(0, 16, 4):
        ctx = context()
        ctx.sample_offset = offset
        part = {k: v[offset : offset + 4] for k, v in batch.items()}
        own = method.counts(part, ctx)["recon"]
        total = total + method.step(part, ctx).losses["recon"] * own
        count = count + own
    assert method.counts(batch, context())["recon"] == count
    torch.testing.assert_close(whole.losses["recon"], total / count, rtol=1e-4, atol=1e-5)
