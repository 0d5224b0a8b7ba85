"""Hugging Face tokenizers behind the one contract."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from tests.encoders.make_hf import CORPUS, byte_bpe, wordpiece
from vlx.core.errors import ConfigError
from vlx.encoders.hf_tokenizer import HfTokenizer

TEXTS = [*CORPUS, "a dog", ""]


def test_bert_ids_equal_those_of_transformers(tmp_path: Path) -> None:
    theirs = wordpiece(tmp_path)
    ours = HfTokenizer(str(tmp_path), 8)
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=8)
    found = ours.encode(TEXTS)
    assert found.ids.tolist() == expected["input_ids"]
    assert found.lengths.tolist() == [sum(row) for row in expected["attention_mask"]]
    assert found.full_lengths.tolist() == [len(ids) for ids in theirs(TEXTS)["input_ids"]]
    assert (found.full_lengths > found.lengths).any()
    assert ours.vocab_size == len(theirs)
    assert (ours.pad_id, ours.start_id, ours.end_id, ours.mask_id) == (0, 2, 3, 4)


def check_ends(tokenizer: HfTokenizer) -> None:
    """The last real token is the end token, and no other is."""
    found = tokenizer.encode(TEXTS)
    for ids, length in zip(found.ids, found.lengths):
        words = ids[len(tokenizer.prefix) : length - 1]
        assert ids[length - 1] == tokenizer.end_id
        assert tokenizer.end_id not in words
        assert (ids[length:] == tokenizer.pad_id).all()
    assert found.lengths.max() == tokenizer.context_length < found.full_lengths.max()


def test_gpt_style_gets_a_start_and_an_end_and_pads_with_the_end(tmp_path: Path) -> None:
    end = "<|endoftext|>"
    theirs = byte_bpe(tmp_path, end, eos_token=end, bos_token=end)
    ours = HfTokenizer(str(tmp_path), 12)
    assert ours.start_id == ours.end_id == ours.pad_id == 0
    assert ours.mask_id is None
    words = theirs("a dog")["input_ids"]  # it adds nothing itself
    found = ours.encode(["a dog"])
    assert found.ids[0].tolist()[: found.lengths[0]] == [0, *words, 0]
    check_ends(ours)


def test_qwen_style_without_a_start_begins_with_a_word(tmp_path: Path) -> None:
    theirs = byte_bpe(tmp_path, "<end>", "<pad>", eos_token="<end>", pad_token="<pad>")
    ours = HfTokenizer(str(tmp_path), 12)
    found = ours.encode(["a dog"])
    assert found.ids[0].tolist()[: found.lengths[0]] == [*theirs("a dog")["input_ids"], 0]
    assert ours.start_id == ours.end_id
    assert ours.pad_id == 1
    check_ends(ours)


def test_llama_style_keeps_its_start_and_gets_an_end(tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = byte_bpe(tmp_path, "<s>", "</s>", template="<s> $A", **names)
    ours = HfTokenizer(str(tmp_path), 12)
    found = ours.encode(["a dog"])
    assert found.ids[0].tolist()[: found.lengths[0]] == [*theirs("a dog")["input_ids"], 1]
    check_ends(ours)


def test_a_special_token_written_in_a_caption_is_text(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    ours = pickle.loads(pickle.dumps(HfTokenizer(str(tmp_path), 16)))
    found = ours.encode(["a [SEP] dog"])
    assert ours.end_id not in found.ids[0, 1 : found.lengths[0] - 1]


def test_a_pickled_copy_encodes_alike(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    ours = HfTokenizer(str(tmp_path), 8)
    copy = pickle.loads(pickle.dumps(ours))
    for before, after in zip(vars(ours.encode(TEXTS)).values(), vars(copy.encode(TEXTS)).values()):
        assert np.array_equal(before, after)
        assert before.dtype == np.int64


def test_a_file_alone_equals_its_directory(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    directory = HfTokenizer(str(tmp_path), 8)
    file = HfTokenizer(str(tmp_path / "tokenizer.json"), 8)
    assert np.array_equal(file.encode(TEXTS).ids, directory.encode(TEXTS).ids)
    for other in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / other).unlink(missing_ok=True)
    bare = HfTokenizer(str(tmp_path), 8)
    assert np.array_equal(bare.encode(TEXTS).ids, directory.encode(TEXTS).ids)


def test_truncation_and_padding_saved_in_the_file_do_not_act(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    before = HfTokenizer(str(tmp_path), 12).encode(TEXTS)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    after = HfTokenizer(str(tmp_path), 12).encode(TEXTS)
    assert np.array_equal(before.ids, after.ids)
    assert np.array_equal(before.full_lengths, after.full_lengths)


def test_decoding_gives_the_words_back(tmp_path: Path) -> None:
    wordpiece(tmp_path / "bert")
    byte_bpe(tmp_path / "gpt", "<end>", eos_token="<end>")
    for name in ("bert", "gpt"):
        ours = HfTokenizer(str(tmp_path / name), 64)
        found = ours.encode(CORPUS)
        assert [ours.decode(row.tolist()) for row in found.ids] == CORPUS


def test_rows_reach_the_highest_id(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    word = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][word] = 500
    file.write_text(json.dumps(content))
    assert HfTokenizer(str(file), 8).vocab_size == 501


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no local directory"),
        (lambda folder: folder.mkdir(), "and no tokenizer.json"),
        (lambda folder: byte_bpe(folder, "<pad>", pad_token="<pad>"), "no end token"),
        (
            lambda folder: byte_bpe(folder, "</s>", "en", template="$A </s> en", eos_token="</s>"),
            "puts </s> en around a text",
        ),
    ],
    ids=["missing", "empty", "no-end", "language-codes"],
)
def test_what_is_no_tokenizer_is_one_line(tmp_path: Path, make, words: str) -> None:
    folder = tmp_path / "tokenizer"
    make(folder)
    with pytest.raises(ConfigError, match=words) as caught:
        HfTokenizer(str(folder), 8)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(ConfigError, match="cannot read the tokenizer") as caught:
        HfTokenizer(str(tmp_path), 8)
    assert "\n" not in str(caught.value)


def test_a_context_without_room_is_refused(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    with pytest.raises(ConfigError, match="context_length=2"):
        HfTokenizer(str(tmp_path), 2)
