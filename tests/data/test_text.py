"""Captions on their way to token ids."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from tests.data.captioned import Pictures
from vlx.core.errors import ConfigError, DataError
from vlx.core.fields import TEXT, TEXT_LENGTH, Needs, ViewSpec
from vlx.data.config import DataConfig, Resident
from vlx.data.pipeline import Share, TrainPipeline
from vlx.data.text import drawn_captions
from vlx.encoders.tokenizers import BpeTokenizer, train_bpe
from vlx.ops.augment import CenterCrop, HorizontalFlip

NEEDS = Needs(views=(ViewSpec("image", ops=(CenterCrop(),)),), fields=(TEXT, TEXT_LENGTH))


def tokenizer(length: int = 24) -> BpeTokenizer:
    texts = [text for own in Pictures().texts for text in own]
    return train_bpe(texts, 400, length)


def pipeline(source: Pictures, resident: Resident = Resident.always, **kwargs) -> TrainPipeline:
    cfg = DataConfig(resident=resident, workers=kwargs.pop("workers", 0), corrupt_limit=0.2)
    return TrainPipeline(
        source,
        kwargs.pop("needs", NEEDS),
        cfg=cfg,
        image_size=8,
        seed=kwargs.pop("seed", 0),
        share=kwargs.pop("share", Share(8)),
        device=torch.device("cpu"),
        tokenizer=kwargs.pop("words", tokenizer()),
        **kwargs,
    )


def shown(batches) -> list[tuple[int, str]]:
    words = tokenizer()
    return [
        (int(i), words.decode(row[:length].tolist()))
        for batch in batches
        for i, row, length in zip(batch["sample_id"], batch["text"], batch["text_length"])
    ]


def test_every_sample_shows_one_of_its_own_captions() -> None:
    source = Pictures()
    for index, text in shown(pipeline(source).batches(0, 5)):
        assert text in source.texts[index]


@pytest.mark.parametrize("bad", [(), (3, 17)])
def test_residents_and_readers_show_the_same_captions(bad: tuple[int, ...]) -> None:
    source = Pictures(bad=bad)
    resident = list(pipeline(source).batches(0, 12))
    for workers in (0, 2):
        read = list(pipeline(source, Resident.never, workers=workers).batches(0, 12))
        for a, b in zip(resident, read, strict=True):
            for key in ("sample_id", "text", "text_length"):
                assert torch.equal(a[key], b[key]), key
    assert not {i for batch in resident for i in batch["sample_id"].tolist()} & set(bad)


def test_another_epoch_shows_other_captions_and_all_are_shown_at_some_time() -> None:
    source = Pictures(48)
    seen: dict[int, set[str]] = {}
    for index, text in shown(pipeline(source).batches(0, 6 * 20)):
        seen.setdefault(index, set()).add(text)
    assert all(seen[i] == set(source.texts[i]) for i in range(48))


def test_captions_do_not_depend_on_the_split_over_processes() -> None:
    source = Pictures()
    whole = dict(shown(pipeline(source).batches(0, 5)))
    parts = [
        pipeline(source, share=Share(8, accumulate=2, rank=rank, world=2)) for rank in range(2)
    ]
    assert whole == {i: t for part in parts for i, t in shown(part.batches(0, 5))}


def test_draws_are_uniform_over_the_captions() -> None:
    ids = torch.arange(30_000)
    drawn = drawn_captions(torch.full((30_000,), 3), ids, 0, 0)
    share = torch.bincount(drawn, minlength=3) / 30_000
    assert (share - 1 / 3).abs().max() < 0.01  # 3.7 standard deviations


@pytest.mark.parametrize("resident", [Resident.always, Resident.never])
def test_cut_captions_and_padding_are_counted(
    resident: Resident, caplog: pytest.LogCaptureFixture
) -> None:
    source, words = Pictures(), tokenizer(6)
    with caplog.at_level(logging.INFO, "vlx"):
        made = pipeline(source, resident, words=words)
        list(made.batches(0, 5))
    counts = made.caption_counts
    if resident is Resident.always:  # every caption once
        found = words.encode([text for own in source.texts for text in own])
        assert counts.captions == len(found.ids)
        assert counts.cut == int((found.full_lengths > 6).sum()) > 0
        assert counts.tokens == int(found.lengths.sum())
        cut = [bool((words.encode(own).full_lengths > 6).any()) for own in source.texts]
        assert counts.first == source.describe(cut.index(True))
        assert f"cut at 6 tokens (text.context_length; first: {counts.first})" in caplog.text
    else:
        ids = next(made.batches(0, 1))["sample_id"].tolist()
        assert counts.first in [source.describe(index) for index in ids]
    assert counts.places == counts.captions * 6


def test_a_mirror_of_captions_that_do_not_survive_it_is_refused() -> None:
    source = Pictures()
    object.__setattr__(source.info, "mirror_safe", False)
    flipped = Needs(
        views=(ViewSpec("image", ops=(CenterCrop(), HorizontalFlip(0.5))),), fields=NEEDS.fields
    )
    with pytest.raises(ConfigError, match=r"method\.flip=0"):
        pipeline(source, needs=flipped)
    pipeline(source)


def test_a_source_without_captions_is_refused() -> None:
    source = Pictures()
    object.__setattr__(source.info, "fields", ("image", "label"))
    with pytest.raises(DataError, match="needs the field 'caption'"):
        pipeline(source)


def test_too_many_unusable_captions_stop_the_run() -> None:
    with pytest.raises(DataError, match="an empty caption"):
        list(pipeline(Pictures(bad=tuple(range(20)))).batches(0, 5))


def test_labels_still_come_along() -> None:
    from vlx.core.fields import LABEL

    needs = Needs(views=NEEDS.views, fields=(LABEL, TEXT, TEXT_LENGTH))
    batch = next(pipeline(Pictures(), needs=needs).batches(0, 1))
    assert np.array_equal(batch["label"].numpy(), batch["sample_id"].numpy() % 2)
