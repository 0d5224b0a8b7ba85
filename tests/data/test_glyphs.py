"""Characters with their names: what a face has, what a picture shows, what splits share."""

from __future__ import annotations

import io
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from rich.console import Console

from tests.data.make import config
from vlx.commands.data import show
from vlx.core.errors import DataError
from vlx.data.open import open_source
from vlx.data.source import Captioned
from vlx.data.sources import glyphs
from vlx.data.sources.glyphs import CLASSES, Glyphs, draw, face_files


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scan of the faces, made once for this file's tests."""
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(autouse=True)
def own_cache(one_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(one_cache))


def opened(split: str = "train", variant: str | None = None) -> Glyphs:
    source = open_source(config(source="glyphs", variant=variant), split)
    assert isinstance(source, Glyphs)
    return source


def characters(source: Glyphs) -> list[str]:
    """Read from what `describe` says: U+0041 in DejaVuSans."""
    return [chr(int(source.describe(i).split()[0][2:], 16)) for i in range(len(source))]


def test_a_caption_is_the_characters_name_and_its_label_stands_in_it() -> None:
    source = opened()
    assert isinstance(source, Captioned)
    assert source.info.fields == ("image", "label", "caption")
    assert not source.info.mirror_safe
    names, labels = source.info.class_names, source.labels()
    for i, character in enumerate(characters(source)):
        [caption] = source.captions(i)
        assert caption == unicodedata.name(character).lower()
        assert names[labels[i]] in caption
    assert set(labels) == set(range(len(CLASSES)))


def test_every_picture_is_small_grey_inked_and_the_same_each_time() -> None:
    source = opened("all")
    copy = pickle.loads(pickle.dumps(source))
    for i in range(0, len(source), 29):
        sample = source.read(i)
        image = sample["image"]
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        assert (image[..., :1] == image).all()
        assert image.min() < 128
        edges = (image[0], image[-1], image[:, 0], image[:, -1])
        assert all((edge == 255).all() for edge in edges), source.describe(i)
        assert sample["caption"] == source.captions(i)
        assert sample["label"] == source.labels()[i]
        np.testing.assert_array_equal(image, copy.read(i)["image"])


def test_a_sample_is_a_character_that_its_face_has() -> None:
    source = opened("all", "faces=DejaVuSans+DejaVuSansMono-Bold+DejaVuSerif-Italic")
    assert source.info.domain_names == ("DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSerif-Italic")
    domains = source.domains()
    assert domains.dtype == np.int64
    assert len(domains) == len(source)
    drawn = np.array(characters(source))
    for domain, face in enumerate(source.info.domain_names):
        has = TTFont(face_files()[face], lazy=True).getBestCmap()
        here = drawn[domains == domain]
        assert len(here) == len(set(here)) > 1000
        assert {ord(character) for character in here} <= set(has)


def test_no_character_is_in_both_splits_whatever_the_faces() -> None:
    train, test = opened("train:DejaVuSans+DejaVuSerif"), opened("test:DejaVuSansMono-Bold")
    assert train.info.domain_names == ("DejaVuSans", "DejaVuSerif")
    assert test.info.domain_names == ("DejaVuSansMono-Bold",)
    assert set(characters(train)).isdisjoint(characters(test))
    everything = opened("all:DejaVuSansMono-Bold")
    rest = opened("train:DejaVuSansMono-Bold")
    assert sorted(characters(everything)) == sorted([*characters(test), *characters(rest)])
    assert 0.15 < len(test) / len(everything) < 0.25


def test_no_two_characters_of_the_reference_face_look_alike() -> None:
    source = opened("all:DejaVuSans")
    pictures = {source.read(i)["image"].tobytes() for i in range(len(source))}
    assert len(pictures) == len(source)
    assert "A" in characters(source)
    assert "\N{CYRILLIC CAPITAL LETTER A}" not in characters(source)


def test_size_and_height_tell_letters_apart() -> None:
    def rows(character: str) -> np.ndarray:
        image = draw(str(face_files()["DejaVuSans"]), character)[..., 0]
        return np.flatnonzero((image < 128).any(1))

    assert len(rows("O")) > 1.2 * len(rows("o"))
    assert rows("O").max() == pytest.approx(rows("o").max(), abs=1)  # one baseline
    superscript, subscript = rows("\N{SUPERSCRIPT TWO}"), rows("\N{SUBSCRIPT TWO}")
    assert superscript.mean() < subscript.mean() - 4


def test_noise_swaps_captions_in_training_only() -> None:
    clean, noisy = opened(), opened(variant="noise=0.2")
    differ = [clean.captions(i) != noisy.captions(i) for i in range(len(clean))]
    # Two faces' pictures of one character have one caption: a swap of those changes nothing.
    assert sum(differ) == pytest.approx(0.2 * len(clean), abs=0.002 * len(clean))
    np.testing.assert_array_equal(clean.labels(), noisy.labels())
    assert clean.info.fingerprint != noisy.info.fingerprint
    held_out = opened("test", "noise=0.2")
    assert all(held_out.captions(i) == opened("test").captions(i) for i in range(0, 500, 50))
    assert held_out.info.fingerprint == opened("test").info.fingerprint


@pytest.mark.parametrize(
    ("split", "variant", "message"),
    [
        ("train:DejaVuSerf", None, "no face 'DejaVuSerf'. Did you mean DejaVuSerif"),
        ("train", "faces=DejaVuMono", "no face 'DejaVuMono'. Did you mean DejaVuSansMono"),
        ("train", "face=DejaVuSans", "no key 'face'. Did you mean faces"),
        ("train", "noise=1.5", "noise=1.5 is outside 0 to 1"),
        ("dev", None, "no split 'dev': use train, test or all"),
    ],
)
def test_a_mistake_names_the_nearest(split: str, variant: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(split, variant)


def test_the_faces_are_scanned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened()

    def refuse(files: object) -> None:
        raise AssertionError("scanned again")

    monkeypatch.setattr(glyphs, "_scan", refuse)
    assert opened().info == first.info


def test_show_counts_both_splits() -> None:
    console = Console(file=io.StringIO(), width=200)
    show("glyphs", ["data.test_split=test:DejaVuSerif-Bold"], 20, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "32x32" in text
    assert "test:DejaVuSerif-Bold" in text
    assert "classes: latin capital letter, latin small letter" in text
