"""CLIP's tokenizer against open_clip's; a trained one against itself."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from vlx.core.caption import clean_albef
from vlx.core.errors import ConfigError
from vlx.encoders.cleaned import CleanedTokenizer
from vlx.encoders.tokenizers import bpe_bytes, bpe_from_file, clip_tokenizer, train_bpe

TEXTS = [
    "A photo of a cat.",
    "don't stop  the   Rock'n'roll 1234 çà été",
    "&lt;b&gt;Ünï &amp;amp; 中文 emoji 😀😁",
    "x" * 400 + " end",
    "the quick brown " * 40,
    "",
    "café's 12.5% — ok!",
    "latin small letter a with ogonek",
    "  tabs\tand\nlines ",
    "ﬁne ligatures, ⅓ and Ⅷ, ½",
]


def test_ids_equal_open_clips_own() -> None:
    import open_clip

    found = clip_tokenizer().encode(TEXTS)
    assert np.array_equal(found.ids, open_clip.get_tokenizer("ViT-B-32")(TEXTS).numpy())


def test_lengths_say_what_was_cut_and_the_end_token_is_last() -> None:
    words = clip_tokenizer(16)
    found = words.encode(TEXTS)
    assert (found.lengths == np.minimum(found.full_lengths, 16)).all()
    assert (found.ids[np.arange(len(TEXTS)), found.lengths - 1] == words.end_id).all()
    assert (found.ids[:, 0] == words.start_id).all()
    assert (found.full_lengths > 16).sum() == 4


def test_decode_inverts_encode_but_for_spaces() -> None:
    words = clip_tokenizer()
    for text in ("a photo of a cat", "été 中文 😀"):
        assert words.decode(words.encode([text]).ids[0].tolist()) == text


def test_a_trained_bpe_keeps_every_byte_and_is_the_same_each_time(tmp_path: Path) -> None:
    words = train_bpe(TEXTS, 400, 64)
    texts = ["Never seen: ŵ 𝄞 \x07!", "latin small letter a"]
    found = words.encode(texts)
    assert [words.decode(row.tolist()) for row in found.ids] == [t.lower() for t in texts]
    assert bpe_bytes(words) == bpe_bytes(train_bpe(TEXTS, 400, 64))
    (tmp_path / "tokenizer.json").write_bytes(bpe_bytes(words))
    again = bpe_from_file(tmp_path / "tokenizer.json", 400, 64)
    assert np.array_equal(again.encode(texts).ids, found.ids)
    copied = pickle.loads(pickle.dumps(again))
    assert np.array_equal(copied.encode(texts).ids, found.ids)
    assert found.ids.max() < 400


def test_frequent_words_become_one_token() -> None:
    words = train_bpe(["latin small letter"] * 50 + TEXTS, 600, 16)
    assert words.encode(["latin small letter"]).full_lengths[0] == 5


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text\.vocab_size=100 must be at least 260"):
        train_bpe(TEXTS, 100, 16)
    with pytest.raises(ConfigError, match=r"text\.context_length=2"):
        clip_tokenizer(2)
    (tmp_path / "tokenizer.json").write_bytes(bpe_bytes(train_bpe(TEXTS, 400, 16)))
    with pytest.raises(ConfigError, match=r"more than text\.vocab_size=300"):
        bpe_from_file(tmp_path / "tokenizer.json", 300, 16)


def test_a_cleaned_tokenizer_is_its_own_on_cleaned_captions() -> None:
    captions = ["A Red-Brown dog, (asleep)!", "two   cats / kittens"]
    inner = clip_tokenizer(16)
    cleaned = CleanedTokenizer(inner, clean_albef)
    expected = inner.encode(["a red brown dog asleep", "two cats kittens"])
    found = cleaned.encode(captions)
    assert (found.ids == expected.ids).all()
    assert (found.lengths == expected.lengths).all()
    assert pickle.loads(pickle.dumps(cleaned)).encode(captions).ids.tolist() == found.ids.tolist()
