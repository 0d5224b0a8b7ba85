"""SparseFormer bootstrapping: the card's checks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.contract.build import batch_for, build, config, context, smoke_batch
from vlx.core.capability import ImageFeatures, ReducedTokens
from vlx.core.errors import ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig
from vlx.methods.sparseformer import SampleMix, Sparseformer, SparseformerConfig


def method_of(encoder: EncoderConfig, classes: int = 10, **changes) -> Sparseformer:
    torch.manual_seed(0)
    builder = EncoderBuilder({"encoder": encoder}, classes, load_weights=False)
    return Sparseformer(SparseformerConfig(**changes), builder)


def count(*parts: torch.nn.Module) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())


@pytest.mark.parametrize(
    ("name", "size", "total", "gmacs"),
    [
        ("vit_base_patch16_224", 224, 64_185_448, 3.78),
        ("vit_large_patch16_384", 384, 212_426_984, 11.34),
    ],
)
def test_parameters_and_cost_are_the_cards(name: str, size: int, total: int, gmacs: float) -> None:
    with torch.device("meta"), torch.no_grad():
        encoder = EncoderConfig(name=name, image_size=size)
        method = method_of(encoder, 1000, student_size=224).eval()
        head = method.teacher.module.backbone.head
        assert count(method.student, head) == total
        with FlopCounterMode(display=False) as flops:
            method.student(torch.empty(1, 3, 224, 224))
    assert flops.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_the_cortex_is_the_vits_blocks_and_its_last_third_stays() -> None:
    method = build("sparseformer")
    vit, student = method.teacher.module.backbone, method.student
    third = len(vit.blocks) // 3
    for ours, theirs in zip(student.blocks, list(vit.blocks)[third:], strict=True):
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
            assert torch.equal(a, b), name
            assert a is not b
    trained = [all(p.requires_grad for p in block.parameters()) for block in student.blocks]
    assert trained == [True] * (len(trained) - third) + [False] * third
    assert not any(p.requires_grad for p in student.norm.parameters())
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_tokens_differ_at_first_by_their_boxes_alone() -> None:
    torch.manual_seed(0)
    cfg = SparseformerConfig(points=9, map_channels=8, mixing_points=4, mixing_dim=16)
    mix = SampleMix(24, cfg)
    tokens, features = torch.randn(2, 5, 24), torch.randn(2, 8, 12, 12)
    box = torch.tensor([0.1, 0.2, 0.6, 0.7]).expand(2, 5, 4)
    added = mix(tokens, box, features) - tokens
    torch.testing.assert_close(added, added[:, :1].expand_as(added))
    moved = torch.cat([box[:, :4], box[:, 4:] + 0.2], dim=1)
    other = mix(tokens, moved, features) - tokens
    torch.testing.assert_close(other[:, :4], added[:, :4])
    assert not torch.allclose(other[:, 4], added[:, 4])


def test_mixing_is_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    cfg = SparseformerConfig(points=4, map_channels=6, mixing_points=5, mixing_dim=16)
    mix = SampleMix(24, cfg)
    for param in mix.parameters():
        torch.nn.init.normal_(param, std=0.3)
    tokens, features = torch.randn(1, 3, 24), torch.randn(1, 6, 10, 10)
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.2, 0.1, 0.9, 0.8], [0.0, 0.0, 1.0, 1.0]]])
    found = mix(tokens, boxes, features)
    for i in range(3):
        t = tokens[0, i]
        offsets = (mix.offsets(t) + mix.grid).view(4, 2)
        offsets = (offsets - offsets.mean(0)) / (3 * (offsets.std(0) + 1e-5))
        low, high = boxes[0, i, :2], boxes[0, i, 2:]
        at = (low + high) / 2 + offsets * (high - low)
        samples = torch.nn.functional.grid_sample(
            features, (2 * at - 1).view(1, 4, 1, 2), padding_mode="border", align_corners=False
        )[0, :, :, 0].T  # (P, C)
        matrices = mix.matrices(t)
        by_channel, by_point = matrices[:36].view(6, 6), matrices[36:].view(5, 4)
        h = torch.nn.functional.gelu(samples @ by_channel)
        h = torch.nn.functional.gelu(by_point @ h)
        torch.testing.assert_close(found[0, i], t + mix.out(h.flatten()), atol=1e-5, rtol=1e-4)


def test_boxes_stay_at_first_and_get_gradient_through_the_points() -> None:
    method = build("sparseformer")
    student = method.student
    images = torch.rand(2, 3, 8, 8)
    features = student.early(images)
    boxes = student.boxes.expand(2, -1, -1)
    tokens = student.token.expand(2, boxes.shape[1], -1)
    _, after = student.focus(tokens, boxes, features)
    torch.testing.assert_close(after, boxes)
    method.step(smoke_batch("sparseformer"), context()).losses["align"].backward()
    assert student.boxes.grad is not None
    assert student.boxes.grad.abs().sum() > 0


def test_the_loss_is_one_less_the_cosine_of_the_class_tokens() -> None:
    method = build("sparseformer")
    batch = smoke_batch("sparseformer")
    loss = method.step(batch, context()).losses["align"]
    ours, theirs = method.encode(batch["image"])[:, 0], method.teach(batch["image"])
    dots = (ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1))
    torch.testing.assert_close(loss, 1 - dots.mean())


def test_the_number_of_tokens_does_not_follow_the_image() -> None:
    encoder = EncoderConfig(
        name="vit_tiny_patch16_224", image_size=32, patch_size=4, dim=32, depth=3, heads=2
    )
    small = {"num_tokens": 10, "points": 4, "map_channels": 8, "mixing_points": 4}
    for side in (16, 32, 48):
        method = method_of(encoder, student_size=side, **small)
        assert method.encode(torch.rand(1, 3, 32, 32)).shape == (1, 10, 32)
    reduced = next(c for c in method.exports() if isinstance(c, ReducedTokens))
    assert reduced.token_counts()["mlp"] == [9] * 4 + [10] * 2
    assert reduced.plain(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_images_without_labels_are_enough() -> None:
    encoder = EncoderConfig(
        name="vit_tiny_patch16_224", image_size=16, patch_size=4, dim=32, depth=3, heads=2
    )
    method = method_of(encoder, classes=0)
    assert [isinstance(c, ImageFeatures) for c in method.exports()] == [True]
    batch = batch_for(Sparseformer.needs(method.cfg), 16)
    assert torch.isfinite(method.step(batch, context()).losses["align"])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"depth": 2}, "2 blocks are too few"),
        ({"name": "vit_base_patch16_siglip_gap_224", "dim": 24}, "this one has none"),
    ],
)
def test_vits_that_do_not_fit_are_refused(changes: dict, line: str) -> None:
    sizes = {"image_size": 16, "patch_size": 8, "dim": 32, "depth": 3, "heads": 2}
    encoder = EncoderConfig(**{"name": "vit_tiny_patch16_224", **sizes, **changes})
    with pytest.raises(ConfigError, match=line):
        method_of(encoder)


def test_boxes_are_not_decayed() -> None:
    decay, no_decay = build("sparseformer").param_groups()
    assert "student.boxes" in dict(no_decay.params)
    assert {"student.token", "student.focus.stages"} <= dict(decay.params).keys()


def test_the_published_norms() -> None:
    norms = [
        m for m in build("sparseformer").student.modules() if isinstance(m, torch.nn.LayerNorm)
    ]
    assert {norm.eps for norm in norms} == {1e-5}
    assert config("sparseformer", "large").method.student_size == 224
