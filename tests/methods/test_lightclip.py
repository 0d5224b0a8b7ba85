"""LightCLIP: soft targets, matching of parts, masked words with the image, and plain inference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from tests.contract.build import build, config, context, smoke_batch
from vlx.core.errors import ConfigError
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig, TextConfig
from vlx.encoders.tokenizers import clip_tokenizer
from vlx.methods.lightclip import (
    Lightclip,
    LightTowers,
    _soft_cross_entropy,
    progressive_loss,
    spoken,
)
from vlx.ops.contrastive import clip_loss, late_interaction
from vlx.ops.masked_words import choose_words


def lightclip() -> Lightclip:
    method = build("lightclip")
    assert isinstance(method, Lightclip)
    return method


def parts(images: int, patches: int, texts: int, words: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    a = normalize(torch.randn(images, patches, 8, generator=generator), dim=-1)
    b = normalize(torch.randn(texts, words, 8, generator=generator), dim=-1)
    return a, b, torch.ones(texts, words, dtype=torch.bool)


@pytest.mark.parametrize(
    ("depth", "total", "name", "image"),
    [
        (4, 38_209_024, "mobilenetv2_100", 2_223_872 + 655_360),
        (6, 44_513_792, "mobilenetv2_100", 2_223_872 + 655_360),
        (12, 63_428_096, "resnet18", 11_176_512 + 262_144),
    ],
)
def test_towers_have_the_cards_parameters(depth: int, total: int, name: str, image: int) -> None:
    builder = EncoderBuilder(
        {"encoder": EncoderConfig(name=name)},
        0,
        text=TextConfig(dim=512, depth=depth),
        tokenizer=clip_tokenizer(),
    )
    with torch.device("meta"):
        towers = LightTowers(builder, 512)

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    assert count(towers.text, towers.projection) == total
    assert count(towers.image, towers.image_projection) == image


def test_without_soft_mass_the_instance_loss_is_clips() -> None:
    images, texts = (normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    scale = torch.tensor(14.0)
    loss, hard = progressive_loss(images, texts, scale, 0.0)
    torch.testing.assert_close(loss, clip_loss(images, texts, scale))
    torch.testing.assert_close(hard, loss)


def test_the_target_of_a_row_sums_to_one_and_its_own_share_is_what_is_left() -> None:
    logits = torch.randn(5, 5)
    others = logits.clone().fill_diagonal_(float("-inf"))
    for soft in (0.1, 0.5):
        target = (1 - soft) * torch.eye(5) + soft * others.softmax(1)
        torch.testing.assert_close(target.sum(1), torch.ones(5))
        expected = -(target * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(_soft_cross_entropy(logits, soft)[0], expected)


def test_with_two_pairs_the_one_negative_takes_all_the_mass() -> None:
    logits = torch.randn(2, 2)
    target = torch.tensor([[0.7, 0.3], [0.3, 0.7]])
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(_soft_cross_entropy(logits, 0.3)[0], expected)


def test_the_mass_grows_from_nothing_to_its_end() -> None:
    method, batch = lightclip(), smoke_batch("lightclip")
    for step, expected in ((0, 0.0), (50, 0.1), (100, 0.2)):
        out = method.step(batch, context(step))
        assert out.metrics["soft_ratio"].item() == pytest.approx(expected)
    assert out.losses["instance"] != out.metrics["hard_instance"]


def test_one_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        lightclip().step(smoke_batch("lightclip", batch_size=1), context())


@pytest.mark.parametrize(("patches", "words"), [(9, 4), (6, 6)])
def test_the_relaxed_matching_is_at_least_the_exact_one(patches: int, words: int) -> None:
    a, b, real = parts(3, patches, 5, words)
    _, by_word = late_interaction(a, b, real, texts_at_once=2)
    for i in range(3):
        for j in range(5):
            similarity = (a[i] @ b[j].T).numpy()
            rows, columns = linear_sum_assignment(similarity, maximize=True)
            exact = similarity[rows, columns].sum() / words
            assert by_word[i, j] >= exact - 1e-6
            best = similarity.argmax(0)
            if len(set(best)) == words:
                assert by_word[i, j].item() == pytest.approx(exact, abs=1e-6)


def test_matching_equals_a_loop_and_its_gradient_that_of_the_loop() -> None:
    a, b, real = parts(4, 5, 6, 3)
    real[2, 1:] = False
    outs = []
    for chunk in (2, None):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        if chunk:
            found = late_interaction(x, y, real, texts_at_once=chunk)
        else:
            rows = [[x[i] @ y[j][real[j]].T for j in range(6)] for i in range(4)]
            found = tuple(
                torch.stack([torch.stack([s.amax(d).mean() for s in row]) for row in rows])
                for d in (1, 0)
            )
        weights = torch.arange(24.0).view(4, 6)
        grads = torch.autograd.grad((found[0] * weights + found[1]).sum(), [x, y])
        outs.append((*found, *grads))
    for one, other in zip(*outs):
        torch.testing.assert_close(one, other)


def test_order_and_padding_do_not_matter_and_no_score_is_above_one() -> None:
    a, b, real = parts(3, 7, 4, 5)
    real[:, 3:] = False
    before = late_interaction(a, b, real)
    shuffled = late_interaction(a[:, torch.randperm(7)], b, real)
    noisy = b.clone()
    noisy[:, 3:] = a[0, 0]
    padded = late_interaction(a, noisy, real)
    for one, two, three in zip(before, shuffled, padded):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three)
        assert one.max() <= 1 + 1e-6


def test_one_word_and_one_patch_score_their_cosine() -> None:
    a, b, real = parts(3, 1, 4, 1)
    for found in late_interaction(a, b, real):
        torch.testing.assert_close(found, a[:, 0] @ b[:, 0].T)


def test_spoken_leaves_out_start_end_and_padding() -> None:
    found = spoken(torch.tensor([5, 2, 3]), 6)
    assert found.int().tolist() == [[0, 1, 1, 1, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]


def test_words_are_hidden_by_berts_rule() -> None:
    ids = torch.full((400, 50), 7)
    may = torch.ones_like(ids, dtype=torch.bool)
    may[:, 0] = False
    u = torch.rand(400, 150, generator=torch.Generator().manual_seed(0))
    found = choose_words(ids, may, u, mask_ratio=0.15, vocab_size=100)
    assert not found.chosen[:, 0].any()
    share = found.chosen[:, 1:].float().mean().item()
    assert share == pytest.approx(0.15, abs=0.01)
    assert not (found.masked & ~found.chosen).any()
    of_chosen = found.masked.sum() / found.chosen.sum()
    assert of_chosen.item() == pytest.approx(0.8, abs=0.03)
    changed = (found.ids != ids) & found.chosen & ~found.masked
    assert (changed.sum() / found.chosen.sum()).item() == pytest.approx(0.099, abs=0.02)
    assert torch.equal(found.ids[~found.chosen], ids[~found.chosen])


def test_closed_gates_hide_the_image_from_the_words_but_learn() -> None:
    method, batch = lightclip().eval(), smoke_batch("lightclip")
    other = batch | {"image": torch.rand_like(batch["image"])}
    first, second = (method.step(b, context()).losses["mlm"] for b in (batch, other))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(first, [method.fusion.gates])
    assert (grad != 0).all()
    with torch.no_grad():
        method.fusion.gates.fill_(1.0)
    first, second = (method.step(b, context()).losses["mlm"] for b in (batch, other))
    assert not torch.equal(first, second)


def test_hiding_words_leaves_the_other_losses_alone() -> None:
    method, batch = lightclip().eval(), smoke_batch("lightclip")
    before = method.step(batch, context()).losses
    method.cfg = replace(method.cfg, mask_ratio=0.9)
    after = method.step(batch, context()).losses
    assert torch.equal(before["instance"], after["instance"])
    assert torch.equal(before["token"], after["token"])
    assert not torch.equal(before["mlm"], after["mlm"])


def test_what_is_exported_is_two_plain_towers() -> None:
    method = lightclip()
    names = set(method.towers.state_dict())
    assert not any("fusion" in n or "mask" in n or "word_head" in n for n in names)
    assert method.towers.text.spec.vocab_size == config("lightclip").text.vocab_size  # type: ignore[union-attr]
    batch = smoke_batch("lightclip")
    method.eval()
    used: set[str] = set()
    for name, module in method.named_modules():
        module.register_forward_hook(lambda *_, n=name: used.add(n))
    method.exports()[0].joint_image_features(batch["image"])  # type: ignore[attr-defined]
    method.exports()[0].text_features(["a"])  # type: ignore[attr-defined]
    assert all(name.startswith("towers") for name in used)


def test_stages_of_a_convolutional_tower_are_fused() -> None:
    cfg = config("lightclip")
    builder = EncoderBuilder(
        {"encoder": EncoderConfig(name="mobilenetv2_050", image_size=32)},
        0,
        load_weights=False,
        text=replace(cfg.text, dim=48),
        tokenizer=build("lightclip").towers.tokenizer,  # type: ignore[union-attr]
    )
    method = Lightclip(cfg.method, builder)
    assert method.stages == [4, 5]
    losses = method.step(smoke_batch("lightclip"), context()).losses
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_more_fused_layers_than_there_are_is_refused() -> None:
    cfg = config("lightclip")
    builder = EncoderBuilder(
        {"encoder": cfg.encoder}, 0, text=cfg.text, tokenizer=lightclip().towers.tokenizer
    )
    with pytest.raises(ConfigError, match=r"method\.fusion_layers=3: the text tower has 2 blocks"):
        Lightclip(replace(cfg.method, fusion_layers=3), builder)
