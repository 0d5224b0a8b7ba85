"""SiT: the card's checks, of both versions and of training on labels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, normalize, relu

from tests.contract.build import config, context
from vlx.commands.dry_run import measure
from vlx.core.config import MethodConfig
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch
from vlx.core.method import Coupled
from vlx.core.step import StepContext
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig
from vlx.methods.sit import Objective, Sit, SitConfig, Variant
from vlx.methods.sit._distort import (
    Boxes,
    blur_inside,
    cover,
    distort,
    draw_boxes,
    draw_kernels,
    until_area,
)
from vlx.methods.sit._momentum import MomentumTask, ProjectionHead
from vlx.methods.sit._rotation import LearnedWeights, RotationTask, turn
from vlx.ops.contrastive import nt_xent

PLAIN, TWO_TOKENS = "vit_tiny_patch16_224", "sit_tiny_patch16_224"
SMALL = {"projection_hidden": 16, "projection_dim": 8, "max_rectangles": 32}
CLASSES = 5


def sit(name: str = PLAIN, drop_path: float = 0.0, classes: int = 0, **method: object) -> Sit:
    """32 pixels in 4x4 patches of 8, two blocks of width 24."""
    torch.manual_seed(0)
    encoder = EncoderConfig(
        name=name, image_size=32, patch_size=8, dim=24, depth=2, heads=3, drop_path=drop_path
    )
    cfg = SitConfig(**{**SMALL, **method})  # type: ignore[arg-type]
    return Sit(cfg, EncoderBuilder({"encoder": encoder}, classes))


def rotating(**method: object) -> Sit:
    return sit(TWO_TOKENS, variant=Variant.rotation, temperature=0.5, **method)


def pair(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    views = {n: torch.rand(count, 3, 32, 32, generator=generator) for n in ("first", "second")}
    return {**views, "sample_id": torch.arange(count)}


def momentum_task(method: Sit) -> MomentumTask:
    assert isinstance(method.task, MomentumTask)
    return method.task


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "dim", "heads", "parts", "total"),
    [
        ("tiny", 192, 3, None, 24_420_099),
        ("small", 384, 6, (21_665_664, 19_423_488, 738_435), 41_827_587),
        ("base", 768, 12, (85_798_656, 20_996_352, 2_361_603), 109_156_611),
    ],
)
def test_the_students_parameters(
    size: str, dim: int, heads: int, parts: tuple[int, int, int] | None, total: int
) -> None:
    cfg = config("sit", "paper")
    name = f"vit_{size}_patch16_224"
    cfg = replace(cfg, encoder=replace(cfg.encoder, name=name, dim=dim, heads=heads))
    assert measure(cfg).trainable_params == total
    if parts is not None:
        assert sum(parts) == total
        with torch.device("meta"):
            method = Sit(cfg.method, EncoderBuilder({"encoder": cfg.encoder}, 0, False))
        student = momentum_task(method).student
        for part, expected in zip(
            (student.encoder, student.projection, student.reconstruction), parts, strict=True
        ):
            assert sum(p.numel() for p in part.parameters()) == expected


def test_the_first_versions_parameters_and_tokens() -> None:
    report = measure(config("sit", "rotation"))
    assert report.total_params == report.trainable_params == 86_786_826
    assert report.tokens["encoder.model.blocks"] == [198] * 12


# --- the current version -------------------------------------------------------------------------


def test_the_projection_is_the_cards_three_layers() -> None:
    torch.manual_seed(0)
    head, x = ProjectionHead(6, 8, 4), torch.randn(10, 6)

    def standard(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    layers = [part for part in head if isinstance(part, nn.Linear)]
    y = relu(standard(layers[0](x)))
    y = gelu(standard(layers[1](y)))
    torch.testing.assert_close(head(x), standard(layers[2](y)))


def test_the_contrast_is_moco_v3s_formula() -> None:
    task = momentum_task(sit())
    q, k = (normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    logits = torch.einsum("nc,mc->nm", q, k) / 0.2
    expected = cross_entropy(logits, torch.arange(6)) * (2 * 0.2)
    torch.testing.assert_close(task.contrast(q, k), expected)


def test_the_contrast_of_orthogonal_images_and_of_equal_ones() -> None:
    task = momentum_task(sit())
    same = torch.eye(8)
    both = 2 * task.contrast(same, same)
    assert float(both) == pytest.approx(0.8 * math.log(1 + 7 * math.exp(-5)), rel=1e-4)
    equal = torch.eye(8)[:1].expand(6, 8)
    assert float(2 * task.contrast(equal, equal)) == pytest.approx(0.8 * math.log(6), rel=1e-5)


def test_positives_are_the_other_view_seen_clean_by_the_teacher() -> None:
    method, batch = sit(), pair()
    task, encoder = momentum_task(method), method.encoder
    out = method.step(batch, context())
    clean = [encoder.normalise(batch[name]) for name in ("first", "second")]
    seen = [task.destroy(x, context(), n)[0] for x, n in zip(clean, ("first", "second"))]
    own = task.student.projection(
        task.student.encoder(torch.cat(seen), normalised=True).prefix[:, 0]
    )
    taught = task.projection(encoder(torch.cat(clean), normalised=True).prefix[:, 0])
    (s1, s2), (t1, t2) = (normalize(x, dim=1).chunk(2) for x in (own, taught))
    labels = torch.arange(4)
    crossed = cross_entropy(s1 @ t2.T / 0.2, labels) + cross_entropy(s2 @ t1.T / 0.2, labels)
    torch.testing.assert_close(out.losses["contrast"], 0.4 * crossed)


def test_only_destroyed_pixels_are_painted_for() -> None:
    method, batch = sit(recon_weight=5.0), pair()
    task = momentum_task(method)
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, out: Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    task.student.reconstruction.register_forward_hook(keep)
    loss = method.step(batch, context()).losses["recon"]
    loss.backward()
    total, count, masks = torch.zeros(()), 0, []
    (painted,) = kept
    for name, part in zip(("first", "second"), painted.chunk(2)):
        clean = method.encoder.normalise(batch[name])
        mask = task.destroy(clean, context(), name)[1].expand_as(clean)
        total, count = total + (part - clean).abs()[mask].sum(), count + int(mask.sum())
        masks.append(mask)
    torch.testing.assert_close(loss, 5 * total / count)
    assert painted.grad is not None
    assert not painted.grad[~torch.cat(masks)].any()
    assert painted.grad[torch.cat(masks)].all()


def test_half_of_the_images_lose_half_of_their_area_to_zeros() -> None:
    task = momentum_task(sit(max_rectangles=128))
    clean = 2 + torch.rand(400, 3, 32, 32)
    seen, mask = task.destroy(clean, context(), "first")
    area = mask.float().mean((1, 2, 3))
    zeros = (seen == 0).flatten(1).any(1)
    assert zeros.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert area[zeros].min() >= 0.5
    assert area[zeros].mean() < 0.56  # no more than the last rectangle over the half
    assert area[~zeros].min() >= 0.3
    assert area[~zeros].mean() < 0.36


def test_the_teacher_starts_as_the_student_and_follows_it_alone() -> None:
    method = sit(drop_path=0.5)
    task = momentum_task(method)
    for own, theirs in ((method.encoder, task.student.encoder), (task.projection,) * 2):
        for a, b in zip(own.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in method.encoder.backbone.blocks]  # type: ignore
    assert rates == [0.0, 0.0]
    before = [p.clone() for p in method.encoder.parameters()]
    with torch.no_grad():
        for param in task.student.parameters():
            param += torch.randn_like(param)
    method.after_step(StepContext(step=0, total_steps=100, steps_per_epoch=10, seed=0))
    for own, old, new in zip(
        method.encoder.parameters(), before, task.student.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(new - own, 0.996 * (new - old), rtol=1e-3, atol=1e-5)
    method.after_step(StepContext(step=100, total_steps=100, steps_per_epoch=10, seed=0))
    assert not any(p.requires_grad for p in method.encoder.parameters())
    assert not any(p.requires_grad for p in task.projection.parameters())


def test_after_its_last_step_the_teacher_stands_still() -> None:
    method = sit()
    task = momentum_task(method)
    with torch.no_grad():
        for param in task.student.parameters():
            param += 1
    before = [p.clone() for p in method.encoder.parameters()]
    method.after_step(StepContext(step=100, total_steps=100, steps_per_epoch=10, seed=0))
    for own, old in zip(method.encoder.parameters(), before, strict=True):
        assert torch.equal(own, old)


def test_tokens_and_positions_are_decayed_and_vectors_are_not() -> None:
    decay, free = sit().param_groups()
    names = {name for name, _ in decay.params}
    assert {"task.student.encoder.vit.cls_token", "task.student.encoder.vit.pos_embed"} <= names
    assert all(param.ndim < 2 for _, param in free.params)


# --- the first version ---------------------------------------------------------------------------


def test_four_quarters_undo_each_other_and_one_is_clockwise() -> None:
    x = torch.rand(4, 3, 5, 5)
    turned = turn(x, torch.arange(4))
    torch.testing.assert_close(turn(turned, torch.tensor([0, 3, 2, 1])), x)
    corner = torch.zeros(1, 1, 3, 3)
    corner[0, 0, 0, 0] = 1.0  # top left goes to top right
    assert turn(corner, torch.tensor([1]))[0, 0, 0, 2] == 1


def test_the_learned_weights_start_and_settle_as_the_formula_says() -> None:
    weights = LearnedWeights()
    losses = {"rotation": torch.tensor(1.4), "contrast": torch.tensor(2.0)}
    losses["recon"] = torch.tensor(0.7)
    total = sum(weights(losses).values())
    expected = math.exp(-1) * 3.4 + math.exp(-0.5) * 0.7 + 1.5
    assert float(total) == pytest.approx(expected, rel=1e-6)
    best = [math.log(2 * a * float(v)) / a for a, v in zip((1, 1, 0.5), losses.values())]
    with torch.no_grad():
        weights.s.copy_(torch.tensor(best))
    torch.stack(list(weights(losses).values())).sum().backward()
    torch.testing.assert_close(weights.s.grad, torch.zeros(3), atol=1e-6, rtol=0)


def test_nt_xent_is_the_released_codes_formula() -> None:
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    z = normalize(torch.cat([a, b]), dim=1)
    similarity = torch.exp(z @ z.T / 0.5)
    total = torch.zeros(())
    for i in range(10):
        others = sum(similarity[i, j] for j in range(10) if j != i)
        total -= torch.log(similarity[i, (i + 5) % 10] / others)
    torch.testing.assert_close(nt_xent(a, b, 0.5), total / 10)


def test_the_first_versions_losses_are_of_turned_views_and_all_pixels() -> None:
    method, batch = rotating(), pair()
    task, encoder = method.task, method.encoder
    assert isinstance(task, RotationTask)
    out = method.step(batch, context())
    total, right, clean, seen, quarters = torch.zeros(()), 0, [], [], []
    for name in ("first", "second"):
        quarter = (context().uniform(batch[name], 1, f"{name}/turn")[:, 0] * 4).long()
        clean.append(turn(encoder.normalise(batch[name]), quarter))
        seen.append(task.corrupt(clean[-1], context(), name))
        quarters.append(quarter)
    made = encoder(torch.cat(seen), normalised=True)
    logits = task.rotation_head(made.prefix[:, 0])
    labels = torch.cat(quarters)
    torch.testing.assert_close(out.metrics["raw_rotation"], cross_entropy(logits, labels))
    right = (logits.argmax(1) == labels).float().mean()
    torch.testing.assert_close(out.metrics["rotation_accuracy"], right)
    painted = task.to_pixels(made.tokens.transpose(1, 2).unflatten(2, (4, 4)))
    total = (painted - torch.cat(clean)).abs().mean()
    torch.testing.assert_close(out.metrics["raw_recon"], total)
    vectors = task.contrast_head(made.prefix[:, 1]).chunk(2)
    torch.testing.assert_close(out.metrics["raw_contrast"], nt_xent(*vectors, 0.5))


def test_every_parameter_of_the_first_version_learns() -> None:
    method = rotating()
    torch.stack(list(method.step(pair(), context()).losses.values())).sum().backward()
    for name, param in method.named_parameters():
        assert param.grad is not None, name
        assert param.grad.abs().sum() > 0, name


def test_the_first_version_refuses_an_encoder_with_one_token() -> None:
    with pytest.raises(ConfigError, match="two task tokens, and this one has 1"):
        sit(variant=Variant.rotation)


def test_boxes_are_those_of_the_loop() -> None:
    u = torch.rand(6, 4, 9)
    boxes = draw_boxes(u, 40, 10)
    used = until_area(boxes, torch.linspace(0, 500, 6))
    mask = cover(boxes, used, 40)
    for row in range(6):
        expected, total = torch.zeros(40, 40, dtype=torch.bool), 0
        for k in range(9):
            if total >= 100 * row:
                break
            top, left = int(u[row, 0, k] * 38), int(u[row, 1, k] * 38)
            bottom = min(top + 2 + int(u[row, 2, k] * 8), 40)
            right = min(left + 2 + int(u[row, 3, k] * 8), 40)
            expected[top:bottom, left:right] = True
            total += (bottom - top) * (right - left)
        assert torch.equal(mask[row, 0], expected), row


def test_a_box_is_blurred_as_a_picture_of_its_own() -> None:
    x = torch.rand(2, 3, 24, 24)
    boxes = Boxes(*(torch.tensor(v)[:, None] for v in ([2, 0], [3, 0], [20, 24], [19, 24])))
    kernels = draw_kernels(torch.tensor([[0.99, 0.4], [0.2, 0.1]]))
    found = blur_inside(x, boxes, kernels)
    for row in range(2):
        top, left, bottom, right = (int(v[row]) for v in boxes)
        picture = x[row : row + 1, :, top:bottom, left:right]
        padded = nn.functional.pad(picture, (7, 7, 7, 7), mode="reflect")
        weight = (kernels[row][:, None] * kernels[row])[None, None].expand(3, 1, 15, 15)
        expected = nn.functional.conv2d(padded, weight, groups=3)
        torch.testing.assert_close(found[row, :, top:bottom, left:right], expected[0])


def test_kernels_are_odd_from_3_to_15_and_sum_to_one() -> None:
    kernels = draw_kernels(torch.cartesian_prod(torch.linspace(0, 0.999, 40), torch.tensor([0.9])))
    widths = (kernels > 0).sum(1)
    assert set(widths.tolist()) == {3, 5, 7, 9, 11, 13, 15}
    torch.testing.assert_close(kernels.sum(1), torch.ones(40))
    torch.testing.assert_close(kernels, kernels.flip(1))


def test_distortions_leave_the_clean_images_and_reach_up_to_the_cards_area() -> None:
    clean = torch.randn(300, 3, 32, 32)
    kept = clean.clone()
    seen = distort(clean, context(), "first", 64)
    assert torch.equal(clean, kept)
    changed = (seen != clean).any(1).float().mean((1, 2))
    assert changed.min() > 0
    # A ninth each is greyed and blurred; noise and aliens take up to 30 % each.
    assert 0.3 < changed.mean() < 0.55
    assert (changed > 0.7).float().mean() < 0.05


# --- training on labels --------------------------------------------------------------------------


def test_the_current_head_reads_the_class_token_beside_the_mean_of_the_patches() -> None:
    method = sit(objective=Objective.finetune, classes=CLASSES, mixup=0.0, cutmix=0.0).eval()
    images = torch.rand(3, 3, 32, 32)
    out = method.encoder(images)
    (head,) = method.task.heads  # type: ignore[misc]
    shapes = [tuple(p.shape) for p in head.parameters()]
    assert shapes == [(24, 48), (24,), (CLASSES, 24), (CLASSES,)]
    logits = head(torch.cat([out.prefix[:, 0], out.tokens.mean(1)], 1))
    torch.testing.assert_close(method.exports()[0].class_logits(images), logits)  # type: ignore
    batch = {"image": images, "label": torch.tensor([0, 4, 2])}
    expected = cross_entropy(logits, batch["label"], label_smoothing=0.1)
    torch.testing.assert_close(method.step(batch, context()).losses["class"], expected)


def test_the_first_versions_heads_add_their_losses_and_average_their_logits() -> None:
    method = sit(
        TWO_TOKENS,
        variant=Variant.rotation,
        objective=Objective.finetune,
        classes=CLASSES,
        smoothing=0.0,
    ).eval()
    images, labels = torch.rand(3, 3, 32, 32), torch.tensor([0, 4, 2])
    prefix = method.encoder(images).prefix
    first, second = (head(prefix[:, i]) for i, head in enumerate(method.task.heads))  # type: ignore
    loss = method.step({"image": images, "label": labels}, context()).losses["class"]
    torch.testing.assert_close(loss, cross_entropy(first, labels) + cross_entropy(second, labels))
    found = method.exports()[0].class_logits(images)  # type: ignore[union-attr]
    torch.testing.assert_close(found, (first + second) / 2)
    free = {name for name, _ in method.param_groups()[1].params}
    assert {"encoder.model.pos_embed", "encoder.model.cls_token", "encoder.model.reg_token"} <= free


def test_every_kind_of_run_can_be_taken_in_parts() -> None:
    """`losses` of the parts' embeddings is the loss of the whole: gradients can be cached."""
    for method in (sit(), rotating()):
        assert isinstance(method, Coupled)
        batch = pair(8)
        whole = method.embed(batch, context())
        parts = []
        for offset in (0, 4):
            ctx = context()
            ctx.sample_offset = offset
            rows = {name: value[offset : offset + 4] for name, value in batch.items()}
            parts.append(method.embed(rows, ctx))
        for name, value in whole.items():
            joined = torch.cat([part[name] for part in parts])
            if isinstance(method.task, RotationTask) and name != "right":
                continue  # an alien behind its image is distorted: of the batch's order alone
            torch.testing.assert_close(joined, value, rtol=1e-4, atol=1e-5)


def test_a_fine_tuned_run_starts_from_the_teachers_trunk(tmp_path) -> None:
    from safetensors.torch import save_file

    method = sit()
    with torch.no_grad():
        for param in method.encoder.parameters():
            param += 0.5
    file = tmp_path / "run.safetensors"
    save_file({k: v.clone() for k, v in method.state_dict().items()}, file)
    encoder = EncoderConfig(
        name=PLAIN, image_size=32, patch_size=8, dim=24, depth=2, heads=3, checkpoint=str(file)
    )
    cfg: MethodConfig = SitConfig(**SMALL, objective=Objective.finetune)  # type: ignore[arg-type]
    tuned = Sit(cfg, EncoderBuilder({"encoder": encoder}, CLASSES))  # type: ignore[arg-type]
    for a, b in zip(tuned.encoder.parameters(), method.encoder.parameters(), strict=True):
        assert torch.equal(a, b)
