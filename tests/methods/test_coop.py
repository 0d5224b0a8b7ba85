"""CoOp and CoCoOp: their sizes, their identities, what trains and what does not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.contract.build import build, config, context
from tests.methods.clip_tuning import (
    NAMES,
    SMALL_TEXT,
    assert_trains_only_prompts,
    batch,
    images,
    logits,
    published,
    small,
    trainable,
    zero_shot,
)
from vlx.blocks.prompts import words_of
from vlx.core.capability import ClassLogits, ImageFeatures, OpenVocabulary
from vlx.core.errors import ConfigError
from vlx.encoders.config import TextConfig
from vlx.encoders.tokenizers import clip_tokenizer
from vlx.families.configs.clip_tuning import ClassPosition
from vlx.methods.coop import Conditional, Coop, CoopConfig, Variant

PHRASE = "a photo of a"
WORDS = {"context_init": PHRASE}


def cocoop(**keys) -> Coop:
    return small(Coop, CoopConfig(variant=Variant.cocoop, **{**WORDS, **keys}))


def conditional(method: Coop) -> Conditional:
    assert isinstance(method.prompts, Conditional)
    return method.prompts


def no_shift(method: Coop) -> Coop:
    """W2 and its bias at zero."""
    last = conditional(method).meta_net[2]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return method


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({}, 8_192),
        ({"class_specific": True}, 819_200),
        (WORDS, 2_048),
        ({"variant": Variant.cocoop, **WORDS}, 35_360),
    ],
)
def test_trainable_parameters_are_the_published_ones(keys: dict, count: int) -> None:
    assert trainable(published(Coop, CoopConfig(**keys))) == count


def test_trainable_parameters_beside_rn50() -> None:
    cfg = CoopConfig(embed_dim=1024)
    method = published(Coop, cfg, encoder="resnet50_clip")
    assert trainable(method) == 8_192
    total = sum(p.numel() for p in method.parameters())
    assert total == 102_007_137 + 8_192


@pytest.mark.parametrize("variant", ["rn50", "cocoop"])
def test_the_other_presets_build_at_their_published_sizes(variant: str) -> None:
    from vlx.commands.dry_run import measure

    count = {"rn50": 8_192, "cocoop": 35_360}[variant]
    assert measure(config("coop", variant), num_classes=50).trainable_params == count


def test_context_of_words_is_zero_shot_clip_with_that_template() -> None:
    method = small(Coop, CoopConfig(**WORDS))
    assert method.context.shape == (4, 32)
    assert torch.equal(logits(method), zero_shot(method, "a photo of a {}."))


def test_the_sentence_is_the_one_that_the_tokenizer_makes() -> None:
    method = small(Coop, CoopConfig(context_tokens=4))
    found = method.towers.tokenizer.encode([f"x x x x {n.replace('_', ' ')}." for n in NAMES])
    assert method.texts.lengths.tolist() == found.lengths.tolist()
    ours, theirs = method.texts.ids.clone(), torch.from_numpy(found.ids)
    assert method.texts.slots.tolist() == [[1, 2, 3, 4]] * len(NAMES)
    ours[:, 1:5] = theirs[:, 1:5]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("count", [4, 5])
def test_where_the_name_stands(count: int) -> None:
    found = {
        position: small(Coop, CoopConfig(context_tokens=count, class_position=position)).texts
        for position in ClassPosition
    }
    tokenizer = clip_tokenizer(16)
    names = words_of(tokenizer, [name.replace("_", " ") for name in NAMES])
    ahead = {ClassPosition.end: count, ClassPosition.middle: count // 2, ClassPosition.front: 0}
    for position, texts in found.items():
        assert torch.equal(texts.lengths, found[ClassPosition.end].lengths)
        for row, slots, name in zip(texts.ids.tolist(), texts.slots.tolist(), names, strict=True):
            first = 1 + ahead[position]
            assert row[first : first + len(name)] == name
            behind = range(first + len(name), 1 + count + len(name))
            assert slots == [*range(1, first), *behind]


@pytest.mark.parametrize("position", list(ClassPosition))
def test_logits_equal_those_of_a_sentence_put_together_by_hand(position: ClassPosition) -> None:
    method = small(Coop, CoopConfig(context_tokens=3, class_position=position))
    table, tokenizer = method.towers.text.token_table, method.towers.tokenizer
    v = method.context.detach()
    rows, lengths = [], []
    for name in NAMES:
        (own,) = words_of(tokenizer, [name.replace("_", " ")])
        name_rows, stop = table.weight[own], table.weight[words_of(tokenizer, ["."])[0]]
        middle = {
            ClassPosition.end: [v, name_rows],
            ClassPosition.middle: [v[:1], name_rows, v[1:]],
            ClassPosition.front: [name_rows, v],
        }[position]
        start, end, pad = (
            table.weight[[i]] for i in (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id)
        )
        row = torch.cat([start, *middle, stop, end])
        lengths.append(len(row))
        rows.append(torch.cat([row, pad.expand(16 - len(row), -1)]))
    with torch.no_grad():
        ids, embeddings = torch.zeros(len(NAMES), 16, dtype=torch.int64), torch.stack(rows)
        text = method.towers.embed_text(ids, torch.tensor(lengths), embeddings=embeddings)
        expected = method.logit_scale() * method.towers.embed_images(images()) @ text.T
    torch.testing.assert_close(logits(method), expected)


@pytest.mark.parametrize("variant", list(Variant))
def test_towers_and_temperature_stay_the_same_bits(variant: Variant) -> None:
    method = small(Coop, CoopConfig(variant=variant, context_tokens=4))
    assert_trains_only_prompts(method, {"context", "prompts.meta_net"})


def test_class_specific_contexts_train_and_know_no_other_classes() -> None:
    method = small(Coop, CoopConfig(class_specific=True, context_tokens=4))
    assert method.context.shape == (len(NAMES), 4, 32)
    assert_trains_only_prompts(method, {"context"})
    kinds = [type(c).__mro__ for c in method.exports()]
    assert not any(OpenVocabulary in kind for kind in kinds)
    one = logits(method)
    with torch.no_grad():
        method.context[2] += 1.0
    changed = (logits(method) != one).any(0)
    assert changed.tolist() == [False, False, True, False, False]


def test_cocoop_without_a_shift_is_coop() -> None:
    plain, shifted = small(Coop, CoopConfig(**WORDS)), no_shift(cocoop())
    assert torch.equal(plain.context, shifted.context)
    # One pass over all images' texts multiplies matrices of another height than one over a text.
    torch.testing.assert_close(logits(shifted), logits(plain), rtol=1e-6, atol=1e-6)


def test_cocoops_shift_is_its_network_of_each_image() -> None:
    method, plain = cocoop(), small(Coop, CoopConfig(**WORDS))
    net = conditional(method).meta_net
    with torch.no_grad():
        image = method.towers.embed_images(images())
        torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
        for number, feature in enumerate(image):
            hidden = (net[0].weight @ feature + net[0].bias).clamp(min=0)  # type: ignore[operator]
            shift = net[2].weight @ hidden + net[2].bias  # type: ignore[operator]
            plain.context.copy_(method.context + shift)
            expected = plain.class_logits(images())[number]
            torch.testing.assert_close(logits(method)[number], expected, rtol=1e-5, atol=1e-5)


def test_cocoop_in_parts_has_the_same_loss_and_gradients() -> None:
    whole, parts = cocoop(), cocoop(texts_at_once=len(NAMES))
    found = []
    for method in (whole, parts):
        loss = method.step(batch(), context()).losses["class"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in method.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", list(Variant))
def test_other_classes_change_no_classs_logit(variant: Variant) -> None:
    method = small(Coop, CoopConfig(variant=variant, context_tokens=4))
    known = logits(method)
    close = {"rtol": 1e-5, "atol": 1e-5}
    more = logits(method, [*NAMES, "zebra", "vase"])
    torch.testing.assert_close(more[:, : len(NAMES)], known, **close)
    order = [3, 0, 4, 1, 2]
    permuted = logits(method, [NAMES[i] for i in order])
    torch.testing.assert_close(permuted, known[:, order], **close)
    unseen = logits(method, ["zebra", "vase"])
    torch.testing.assert_close(unseen, more[:, len(NAMES) :], **close)


def test_underscores_are_spaces() -> None:
    method = small(Coop, CoopConfig(context_tokens=4))
    assert torch.equal(logits(method, ["flat_screen_tv"]), logits(method, ["flat screen tv"]))


def test_its_exports() -> None:
    method = small(Coop, CoopConfig(context_tokens=4)).eval()
    found = method.exports()
    (own,) = (c for c in found if isinstance(c, ClassLogits))
    (any_names,) = (c for c in found if isinstance(c, OpenVocabulary))
    (features,) = (c for c in found if isinstance(c, ImageFeatures))
    with torch.no_grad():
        assert torch.equal(own.class_logits(images()), any_names.logits_of(images(), NAMES))
        assert features.image_features(images()).shape == (3, 32)


def test_long_names_are_cut_before_their_end_token() -> None:
    name = "a very long name of a class that nobody would ever give to a class of images"
    method = small(Coop, CoopConfig(**WORDS), names=[*NAMES, name])
    assert method.texts.cut == (name,)
    assert method.texts.lengths[-1] == 16
    template = zero_shot(method, "a photo of a {}.", [*NAMES, name])
    assert torch.equal(logits(method), template)


def test_what_cannot_be_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"text\.context_length=16 leaves no place for a class"):
        small(Coop, CoopConfig(context_tokens=16))
    with pytest.raises(ConfigError, match=r"method\.context_init='a b': class-specific"):
        CoopConfig(class_specific=True, context_init="a b")
    with pytest.raises(ConfigError, match=r"method\.variant=cocoop has one context"):
        CoopConfig(variant=Variant.cocoop, class_position=ClassPosition.front)
    with pytest.raises(ConfigError, match=r"method\.context_init='' holds no word"):
        small(Coop, CoopConfig(context_init=""))
    with pytest.raises(ConfigError, match="a classifier needs labels"):
        small(Coop, CoopConfig(), names=["one"])


def test_random_weights_are_worth_a_warning_and_a_runs_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    from tests.methods.clip_tuning import SMALL
    from vlx.encoders.build import EncoderBuilder
    from vlx.methods.clip import Clip, ClipConfig

    def builder() -> EncoderBuilder:
        return EncoderBuilder(
            {"encoder": SMALL},
            len(NAMES),
            text=SMALL_TEXT,
            tokenizer=clip_tokenizer(16),
            class_names=NAMES,
        )

    with caplog.at_level(logging.WARNING, "vlx"):
        torch.manual_seed(1)
        Coop(CoopConfig(embed_dim=16, **WORDS), builder())
        assert "CLIP stays frozen with random weights" in caplog.text
        caplog.clear()
        trained = Clip(ClipConfig(embed_dim=16), builder())
        save_file(trained.state_dict(), tmp_path / "model.safetensors")
        method = Coop(CoopConfig(embed_dim=16, weights=str(tmp_path), **WORDS), builder())
    assert not caplog.text
    with torch.no_grad():
        image = trained.towers.embed_images(images())
        text = trained.towers.embed_texts([f"a photo of a {n.replace('_', ' ')}." for n in NAMES])
        assert torch.equal(logits(method), trained.logit_scale() * image @ text.T)


def test_the_words_of_a_tokenizer_that_is_not_trained_yet_fit() -> None:
    """`check_build` and dry runs know only bytes: "a photo of a" is then thirteen tokens."""
    from vlx.encoders.build import EncoderBuilder
    from vlx.encoders.config import EncoderConfig
    from vlx.engine.text import shape_tokenizer

    text = TextConfig(tokenizer="bpe", vocab_size=512, context_length=8)
    encoder = EncoderConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=8)
    with torch.device("meta"):
        builder = EncoderBuilder(
            {"encoder": encoder}, 9, False, text=text, tokenizer=shape_tokenizer(text)
        )
        method = Coop(CoopConfig(**WORDS), builder)
    assert method.class_names[:2] == ("class 0", "class 1")


def test_an_adapter_is_small_and_gives_its_methods_logits(tmp_path: Path) -> None:
    from vlx.engine.adapter import describe, load_adapter, save_adapter

    first = small(Coop, CoopConfig(context_tokens=4))
    assert_trains_only_prompts(first, {"context"})
    file = save_adapter(tmp_path, first, first.state_dict(), slug="coop")
    assert file.stat().st_size < 2_000
    assert describe(first).endswith("inserted context")
    again = small(Coop, CoopConfig(context_tokens=4), names=["zebra", "vase", "rug"])
    load_adapter(str(tmp_path), again, slug="coop")
    assert torch.equal(logits(again, NAMES), logits(first))


def test_the_smoke_preset_takes_base_classes_and_sixteen_shots() -> None:
    cfg = config("coop")
    assert (cfg.data.shots, cfg.data.classes.name) == (16, "base")
    assert cfg.eval.at_end == ["base-to-new", "classification"]
    assert build("coop").frozen_base


@pytest.mark.slow
def test_a_run_trains_on_few_shots_and_is_evaluated_under_its_datas_class_names(
    tmp_path: Path,
) -> None:
    from dataclasses import replace

    from tests.engine.inprocess import run_here
    from vlx.commands.start import prepare
    from vlx.config.compose import compose
    from vlx.core.results import read_results
    from vlx.engine.evaluate_encoder import build_subject

    words = ["track=none", f"runs_dir={tmp_path}", "name=run", "train.threads=1"]
    words += ["eval.at_end=[base-to-new]", "eval.compare_untrained=false", "train.steps=2"]
    directory = prepare(compose("coop", "finetune", "smoke", words), words)
    code, printed = run_here(directory)
    assert code == 0
    assert "inserted context" in printed
    assert read_results(directory).value("base-to-new/harmonic-mean") is not None
    cfg = config("coop")
    cfg.encoder = replace(cfg.encoder, checkpoint=str(directory))
    names = ("arrow", "star")
    _, method = build_subject(cfg, len(names), names)
    assert isinstance(method, Coop)
    assert method.class_names == names
    assert method.class_logits(images()).shape == (3, 2)
