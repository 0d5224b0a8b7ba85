"""Every method that names classes does so in words: what its builder hands it, and what it says."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.contract.build import config
from vlx.core import registry
from vlx.core.method import Trainable
from vlx.encoders.build import EncoderBuilder
from vlx.engine.build import builder_of
from vlx.engine.text import shape_tokenizer

IDS = ("n01440764", "n01443537", "n02102040")
WORDS = ("tench", "goldfish", "English Springer Spaniel")
NUMBERS = ("0", "1", "2")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What methods were told of class names, in order."""
    found: list[tuple[str, ...]] = []
    own = EncoderBuilder.class_names
    assert own.fget is not None

    def told(self: EncoderBuilder) -> tuple[str, ...]:
        assert own.fget is not None
        found.append(own.fget(self))
        return found[-1]

    monkeypatch.setattr(EncoderBuilder, "class_names", property(told))
    return found


def built(slug: str, names: tuple[str, ...]) -> Trainable:
    cfg = config(slug)
    torch.manual_seed(0)
    builder = builder_of(cfg, len(names), shape_tokenizer(cfg.text), names, load_weights=True)
    cls = registry.load(slug)
    assert issubclass(cls, Trainable)
    return cls(cfg.method, builder)


@pytest.mark.parametrize("slug", registry.papers())
def test_folder_ids_are_words_and_numbers_are_warned_of(
    slug: str, read: list[tuple[str, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    built(slug, IDS)
    reads = bool(read)
    assert set(read) == ({WORDS} if reads else set())
    assert reads == (slug in READERS)
    caplog.clear()
    built(slug, NUMBERS)
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    numbered = [line for line in said if "class names, and these are numbers: 0, 1, 2" in line]
    assert len(numbered) == reads
    assert all("data.class_names=FILE" in line for line in numbered)


READERS = ("coop", "maple", "pre", "vl2v-adip")


@pytest.mark.parametrize("slug", READERS)
def test_the_words_are_what_a_method_says(slug: str) -> None:
    assert built(slug, IDS).class_names == WORDS  # type: ignore[attr-defined]
