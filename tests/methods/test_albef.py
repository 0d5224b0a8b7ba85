"""ALBEF: its sizes, its three losses, its teacher and queues, and its fine-tuning for retrieval."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from tests.contract.build import build, config, context, seeded_step, smoke_batch
from tests.engine.inprocess import run_here, stop_after
from vlx.blocks import queue as queue_module
from vlx.commands.start import prepare
from vlx.config.compose import compose
from vlx.core.capability import DualEncoder, PairScorer
from vlx.core.errors import CheckpointError, ConfigError
from vlx.core.step import StepContext
from vlx.core.text import Tokenizer
from vlx.encoders.build import EncoderBuilder
from vlx.encoders.config import EncoderConfig, TextConfig
from vlx.encoders.tokenizers import clip_tokenizer
from vlx.engine import checkpoint
from vlx.engine.build import builder_of
from vlx.engine.text import run_tokenizer, shape_tokenizer
from vlx.methods.albef import Albef, Objective, SameImage
from vlx.ops.contrastive import distilled_contrast, hard_negatives
from vlx.ops.masked_words import distilled_words


def albef(**changes: object) -> Albef:
    """The smoke preset's, with other keys of the method."""
    cfg = config("albef")
    torch.manual_seed(0)
    builder = builder_of(cfg, 0, shape_tokenizer(cfg.text), load_weights=False)
    return Albef(replace(cfg.method, **changes), builder)


def without_distillation() -> StepContext:
    return context(0)


def full_distillation() -> StepContext:
    return context(10)  # ten steps are an epoch there


def stirred(method: Albef, scale: float = 0.05) -> Albef:
    """The student away from its teacher."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in method.towers.parameters():
            param += scale * torch.randn(param.shape, generator=generator)
    return method


@pytest.fixture(scope="module")
def paper() -> Albef:
    with torch.device("meta"):
        method = build("albef", "paper")
    assert isinstance(method, Albef)
    return method


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parts_have_the_published_parameters(paper: Albef) -> None:
    towers = paper.towers
    assert count(towers.image) == 85_844_736
    assert count(towers.text) == 123_075_072
    assert count(towers.word_head) == 622_650
    assert count(towers.image_projection, towers.text_projection) == 393_728
    assert count(paper.match_head) == 1_538
    assert count(paper.teacher) == 209_936_186
    assert sum(p.numel() for p in paper.parameters() if p.requires_grad) == 209_937_725
    assert paper.image_queue.columns.numel() == paper.text_queue.columns.numel() == 16_777_216


@pytest.mark.parametrize(("side", "expected"), [(256, 23.20), (384, 55.48)])
def test_an_image_has_the_cards_cost(side: int, expected: float) -> None:
    cfg = EncoderConfig(name="deit_base_patch16_224", image_size=side)
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        EncoderBuilder({"encoder": cfg}, 0).vision()(torch.empty(1, 3, side, side))
    assert flops.get_total_flops() / 2e9 == pytest.approx(expected, rel=0.02)


def test_without_distillation_the_contrast_is_a_plain_cross_entropy() -> None:
    method = stirred(albef()).eval()
    batch = smoke_batch("albef")
    loss = method.step(batch, without_distillation()).losses["itc"]
    with torch.no_grad():
        own, taught = method.towers.encode(batch), method.teacher.module.encode(batch)
        sides = []
        for query, candidates, queue in (
            (own.image_vector, taught.text_vector, method.text_queue),
            (own.text_vector, taught.image_vector, method.image_queue),
        ):
            rows = []
            for i in range(len(query)):
                near = [query[i] @ one for one in (*candidates, *queue.columns.T)]
                rows.append(torch.stack(near) / 0.07)
            sides.append(cross_entropy(torch.stack(rows), torch.arange(len(query))))
    torch.testing.assert_close(loss, sum(sides) / 2, rtol=1e-5, atol=1e-5)


def test_the_teachers_targets_enter_the_contrast_by_alpha() -> None:
    logits, taught = torch.randn(3, 7), torch.randn(3, 7)
    own = torch.eye(3, 7, dtype=torch.bool)
    expected = 0.0
    for i in range(3):
        target = 0.6 * own[i].float() + 0.4 * taught[i].softmax(0)
        expected += -(target * logits[i].log_softmax(0)).sum() / 3
    torch.testing.assert_close(distilled_contrast(logits, taught, own, 0.4), expected)
    plain = cross_entropy(logits, torch.arange(3))
    torch.testing.assert_close(distilled_contrast(logits, taught, own, 0.0), plain)


def test_word_loss_is_plain_at_alpha_zero_and_flat_at_its_teacher() -> None:
    logits = torch.randn(2, 5, 11, requires_grad=True)
    ids = torch.randint(11, (2, 5))
    plain = cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    torch.testing.assert_close(distilled_words(logits, torch.randn(2, 5, 11), ids, 0.0), plain)
    flat = distilled_words(logits, logits.detach().clone(), ids, 1.0).sum()
    (grad,) = torch.autograd.grad(flat, [logits])
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)


def test_masked_words_learn_nothing_from_a_teacher_that_is_the_student() -> None:
    method, batch = albef(alpha=1.0).eval(), smoke_batch("albef")
    for ctx, is_flat in ((full_distillation(), True), (without_distillation(), False)):
        loss = method.step(batch, ctx).losses["mlm"]
        (grad,) = torch.autograd.grad(loss, [method.towers.word_head.bias])
        assert bool(grad.abs().max() < 1e-6) is is_flat


def test_alpha_rises_over_the_first_epoch_and_stays() -> None:
    method, batch = albef(), smoke_batch("albef")
    for step, expected in ((0, 0.0), (5, 0.2), (10, 0.4), (50, 0.4)):
        found = method.step(batch, context(step)).metrics["alpha"].item()
        assert found == pytest.approx(expected), step


def test_the_class_token_is_never_hidden_and_the_end_may_be(monkeypatch) -> None:
    from vlx.methods import albef as module

    method, batch, seen = albef(mask_ratio=1.0), smoke_batch("albef"), []
    choose = module.choose_words

    def watched(ids: Tensor, may: Tensor, *args, **kwargs):
        seen.append(may)
        return choose(ids, may, *args, **kwargs)

    monkeypatch.setattr(module, "choose_words", watched)
    method.step(batch, context())
    (may,) = seen
    assert not may[:, 0].any()
    assert torch.equal(may.sum(1), batch["text_length"] - 1)


def test_queues_take_the_teachers_features_in_a_ring_of_unit_columns() -> None:
    method = stirred(albef(queue_size=16)).eval()
    for step in range(3):
        batch = smoke_batch("albef", seed=step)
        with torch.no_grad():
            taught = method.teacher.module.encode(batch)
        before = copy.deepcopy(method.text_queue)
        method.step(batch, context(step))
        assert torch.equal(method.text_queue.columns, before.columns)  # a step left out
        method.after_step(context(step))
        place = 8 * step % 16
        for queue, vectors in (
            (method.image_queue, taught.image_vector),
            (method.text_queue, taught.text_vector),
        ):
            assert queue.pointer == 8 * (step + 1) % 16
            assert torch.equal(queue.columns[:, place : place + 8], vectors.T)
            torch.testing.assert_close(queue.columns.norm(dim=0), torch.ones(16))
    method.after_step(context(3))
    assert method.image_queue.pointer == 8


def test_all_processes_features_are_enqueued(monkeypatch) -> None:
    method = albef()
    method.step(smoke_batch("albef"), context())
    monkeypatch.setattr(queue_module, "world_size", lambda: 2)
    monkeypatch.setattr(queue_module, "gather_rows", lambda x: torch.cat([x, -x]))
    method.after_step(context())
    columns = method.image_queue.columns
    assert method.image_queue.pointer == 16
    assert torch.equal(columns[:, 8:16], -columns[:, :8])


def test_the_teacher_follows_by_its_share_and_has_no_gradient() -> None:
    method = stirred(albef())
    teacher = copy.deepcopy(method.teacher.module)
    losses = method.step(smoke_batch("albef"), full_distillation()).losses
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    method.after_step(context())
    students = dict(method.towers.named_parameters())
    before = dict(teacher.named_parameters())
    for name, param in method.teacher.module.named_parameters():
        torch.testing.assert_close(
            param - before[name], 0.005 * (students[name] - before[name]), rtol=1e-2, atol=1e-6
        )


def test_the_teacher_drops_out_in_training() -> None:
    method, batch = albef(), smoke_batch("albef")
    teacher = method.teacher.module
    with torch.no_grad():
        first, second = (teacher.encode(batch).text for _ in range(2))
    assert not torch.equal(first, second)


def test_negatives_are_never_excluded_and_the_alike_are_drawn_more_often() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    excluded = torch.tensor([[False, False, False, True]])
    u = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    drawn = hard_negatives(logits.expand(4000, -1), excluded.expand(4000, -1), u)
    shares = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares[:3], logits[0, :3].softmax(0), atol=0.03, rtol=0)
    assert shares[3] == 0


def test_negatives_are_found_where_every_weight_underflows() -> None:
    logits = torch.full((3, 3), -1000.0) + torch.diag(torch.full((3,), 2000.0))
    drawn = hard_negatives(logits, torch.eye(3, dtype=torch.bool), torch.rand(3, 3))
    assert (drawn != torch.arange(3)).all()
    at_the_end = hard_negatives(logits, torch.eye(3, dtype=torch.bool), torch.zeros(3, 3))
    assert (at_the_end != torch.arange(3)).all()


def test_matching_compares_pairs_with_others_and_no_negative_is_its_own_pair(monkeypatch) -> None:
    method, batch = albef().eval(), smoke_batch("albef")
    calls = []
    fuse = method.towers.text.fuse

    def watched(tokens: Tensor, lengths: Tensor, image: Tensor, rows: Tensor | None = None):
        calls.append((tokens, rows))
        return fuse(tokens, lengths, image, rows)

    monkeypatch.setattr(method.towers.text, "fuse", watched)
    method.step(batch, context())
    tokens, images = calls[0]
    own = method.towers.encode(batch).text
    rows = torch.arange(8)
    texts = torch.stack([(own == token).flatten(1).all(1).int().argmax() for token in tokens])
    assert torch.equal(texts[:16], rows.repeat(2))
    assert torch.equal(images[:8], rows)
    assert torch.equal(images[16:], rows)
    assert (images[8:16] != rows).all()
    assert (texts[16:] != rows).all()


def test_matching_starts_near_a_coins_toss() -> None:
    losses = [
        seeded_step(albef(), smoke_batch("albef", seed=s), s).losses["itm"].item() for s in range(4)
    ]
    assert sum(losses) / 4 == pytest.approx(math.log(2), abs=0.2)


@pytest.mark.slow
def test_matching_and_contrast_fit_eight_pairs() -> None:
    method, batch = albef(), smoke_batch("albef")
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    accuracy = []
    for step in range(500):
        out = seeded_step(method, batch, step)
        optimizer.zero_grad()
        sum(out.losses.values(), torch.zeros(())).backward()
        optimizer.step()
        method.after_step(context(step))
        accuracy.append(out.metrics["itm_accuracy"].item())
    assert max(accuracy[:50]) < 0.8  # the share of unmatched pairs is 0.67
    assert min(accuracy[-20:]) > 0.9


def test_patches_learn_from_matching_and_words_and_the_temperature_from_the_contrast() -> None:
    method, batch = albef().eval(), smoke_batch("albef")
    made: list[Tensor] = []
    image_tokens = method.towers.image_tokens

    def watched(images: Tensor) -> Tensor:
        made.append(image_tokens(images))
        return made[-1]

    method.towers.image_tokens = watched  # type: ignore[method-assign]
    losses = method.step(batch, full_distillation()).losses
    reached = {}
    for name, loss in losses.items():
        wanted = [made[0], method.temperature.value]
        tokens, value = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        patches = tokens is not None and bool(tokens[:, 1:].abs().sum() > 0)
        reached[name] = (patches, value is not None)
    assert reached == {"itc": (False, True), "itm": (True, False), "mlm": (True, False)}


def test_the_temperature_is_decayed_and_other_vectors_are_not() -> None:
    decay, rest = albef().param_groups()
    assert "temperature.value" in dict(decay.params)
    assert decay.weight_decay is None
    assert rest.weight_decay == 0.0
    assert {p.ndim for _, p in rest.params} == {1}


def test_the_temperature_stays_within_its_bounds() -> None:
    method, batch = albef(), smoke_batch("albef")
    for value, bound in ((3.0, 0.5), (-1.0, 0.001)):
        with torch.no_grad():
            method.temperature.value.fill_(value)
        method.after_step(context())
        out = method.step(batch, context())
        assert out.metrics["temperature"].item() == pytest.approx(bound)


def test_retrieval_spreads_its_targets_over_all_candidates_of_an_image() -> None:
    pairs = SameImage(4)
    pairs.enqueue(torch.tensor([5, 9]))
    found = pairs(torch.tensor([9, 7, 9]))
    assert found.int().tolist() == [
        [1, 0, 1, 0, 1, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 1, 0, 0],
    ]
    logits = torch.randn(3, 7)
    loss = distilled_contrast(logits, logits, found, 0.0)
    log = logits.log_softmax(1)
    rows = [log[0, [0, 2, 4]].mean(), log[1, 1], log[2, [0, 2, 4]].mean()]
    torch.testing.assert_close(loss, -torch.stack(rows).mean())


def test_retrieval_hides_no_words_and_remembers_its_images() -> None:
    method, batch = albef(objective=Objective.retrieval), smoke_batch("albef")
    assert not any("word_head" in name for name in method.state_dict())
    batch["sample_id"] = torch.tensor([0, 0, 2, 3, 4, 5, 6, 7])
    assert set(method.step(batch, context()).losses) == {"itc", "itm"}
    method.after_step(context())
    ids = method.state_dict()["positives.ids.columns"][0]
    assert ids[:8].tolist() == batch["sample_id"].tolist()
    assert (ids[8:] == -100).all()
    same = method.positives(batch["sample_id"])
    assert same[0].nonzero().flatten().tolist() == [0, 1, 8, 9]
    for seed in range(20):
        u = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
        assert (hard_negatives(torch.zeros(8, 8), same[:, :8], u)[:2] > 1).all()


def test_exports_rank_by_both_towers_and_by_pairs() -> None:
    method = albef().eval()
    joint, scorer, _ = method.exports()
    assert isinstance(joint, DualEncoder)
    assert isinstance(scorer, PairScorer)
    texts, images = ["latin small letter a", "rightwards arrow"], torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for found in (joint.text_features(texts), joint.joint_image_features(images)):
            torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
        scores = scorer.pair_scores(images, texts)
        alone = scorer.pair_scores(images[1:], texts[1:])
        swapped = scorer.pair_scores(images, texts[::-1])
    assert joint.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)
    torch.testing.assert_close(scores[1:], alone, rtol=1e-4, atol=1e-5)
    assert not torch.equal(scores, swapped)


def test_what_cannot_be_trained_is_refused() -> None:
    cfg = config("albef")
    tokenizer = clip_tokenizer(16)
    builder = EncoderBuilder(
        {"encoder": cfg.encoder}, 0, text=replace(cfg.text, vocab_size=None), tokenizer=tokenizer
    )
    with pytest.raises(ConfigError, match=r"has no mask token: use text\.tokenizer=bpe"):
        Albef(cfg.method, builder)
    Albef(replace(cfg.method, objective=Objective.retrieval), builder)
    with pytest.raises(ConfigError, match="queue_size=20 is no multiple of the 8 samples"):
        albef(queue_size=20).step(smoke_batch("albef"), context())
    with pytest.raises(ConfigError, match="at least 2"):
        albef().step(smoke_batch("albef", batch_size=1), context())
    convolutional = EncoderBuilder(
        {"encoder": EncoderConfig(name="resnet18", image_size=32)},
        0,
        text=cfg.text,
        tokenizer=shape_tokenizer(cfg.text),
    )
    with pytest.raises(ConfigError, match="reads the class token"):
        Albef(cfg.method, convolutional)


def run(tmp_path: Path, name: str) -> Path:
    keys = ["track=none", f"runs_dir={tmp_path}", f"name={name}", "train.threads=1"]
    keys += ["train.batch_size=8", "eval.at_end=[]", "eval.during=[]"]
    directory = prepare(compose("albef", "align", "smoke", keys), ())
    run_here(directory)
    return directory


def weights(directory: Path) -> dict[str, Tensor]:
    found = checkpoint.latest(directory / "checkpoints")
    assert found is not None
    return checkpoint.load(found).model


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("runs"), "whole")


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(tmp_path: Path, whole: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        cut = run(tmp_path, "cut")
    assert weights(cut)["image_queue.pointer"] == 16
    assert run_here(cut)[0] == 0
    expected, found = weights(whole), weights(cut)
    assert expected["image_queue.pointer"] == 32
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    moved = expected["teacher.module.text.tokens.weight"] - expected["towers.text.tokens.weight"]
    assert moved.abs().max() > 0


@pytest.mark.slow
def test_retrieval_starts_from_a_run_with_larger_images_and_new_queues(whole: Path) -> None:
    cfg = config("albef")
    method = replace(cfg.method, objective=Objective.retrieval, weights=str(whole))
    text = replace(cfg.text, tokenizer=str(whole))
    encoder = replace(cfg.encoder, image_size=40)

    def start(text: TextConfig, tokenizer: Tokenizer | None) -> Albef:
        roles = {"encoder": encoder}
        return Albef(method, EncoderBuilder(roles, 0, text=text, tokenizer=tokenizer))

    saved = weights(whole)
    for name, value in start(text, run_tokenizer(text, whole)).state_dict().items():
        if "pos_embed" in name:
            assert value.shape[1] == 101
        elif not name.startswith(("image_queue", "text_queue", "positives")):
            assert torch.equal(value, saved[name]), name
    with pytest.raises(CheckpointError, match=r"set text\.tokenizer="):
        start(cfg.text, shape_tokenizer(cfg.text))
