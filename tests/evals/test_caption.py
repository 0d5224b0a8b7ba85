"""`vlx eval caption`: words, and pycocoevalcap's scores on hand cases."""

from __future__ import annotations

import math

import pytest
import torch

from tests.evals.twin import Pairs, Twin, eval_data, subject
from vlx.core.errors import DataError
from vlx.evals.base import Subject
from vlx.evals.caption import score_captions, words, write_captions
from vlx.evals.registry import evaluator

# Checked against Stanford's PTBTokenizer 3.4.1 -lowerCase with pycocoevalcap's list of punctuation.
AS_THE_TREEBANK = {
    "A dog's tail isn't wagging, and it can't stop!": (
        "a dog 's tail is n't wagging and it ca n't stop"
    ),
    'Two well-known men play "frisbee" at 3.5 km/h; it\'s 10:30.': (
        "two well-known men play frisbee at 3.5 km/h it 's 10:30"
    ),
    "A man\u2014wearing a hat\u2014rides a bike...": "a man wearing a hat rides a bike",
    "He said: 'hello there' & left $1,000 on the table?": (
        "he said hello there & left $ 1,000 on the table"
    ),
    "the children's toys cannot be 50% off": "the children 's toys can not be 50 % off",
    "a cat_and dog #1 caf\u00e9 3/4 cup": "a cat_and dog # 1 caf\u00e9 3/4 cup",
    "they'd we'll you're I'm I've the dogs' bowls": (
        "they 'd we 'll you 're i 'm i 've the dogs bowls"
    ),
    "it\u2019s \u201cquoted\u201d text": "it 's quoted text",
    "a-b-c -dash- --": "a-b-c dash",
}


@pytest.mark.parametrize(("text", "expected"), AS_THE_TREEBANK.items())
def test_words_are_the_treebanks(text: str, expected: str) -> None:
    assert words(text) == expected


def test_brackets_go_and_abbreviations_lose_their_last_stop() -> None:
    assert words("(a) [b] at 5 p.m. in the U.S.") == "a b at 5 p.m in the u.s"
    assert words("!!! ... --") == ""


def test_a_perfect_caption_has_perfect_scores() -> None:
    texts = ["A big dog runs on the grass.", "two small cars wait near a street"]
    found = score_captions([text.upper() for text in texts], [[texts[0], "dog"], [texts[1]]])
    for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge-l"):
        assert found[name] == pytest.approx(1, abs=1e-6)
    alone = score_captions(texts, [[text] for text in texts])
    assert alone["cider"] == pytest.approx(10)


def test_scores_by_hand() -> None:
    """Papineni et al. (2002), Lin (2004); precision 3/4 and 1/3, brevity exp(1 - 5/4)."""
    found = score_captions(["a dog sits there"], [["the dog sits there now"]])
    brevity = math.exp(1 - 5 / 4)
    assert found["bleu1"] == pytest.approx(3 / 4 * brevity)
    assert found["bleu2"] == pytest.approx(math.sqrt(3 / 4 * 2 / 3) * brevity)
    precision, recall, beta = 3 / 4, 3 / 5, 1.2
    expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert found["rouge-l"] == pytest.approx(expected)
    assert found["cider"] == 0  # of one image every n-gram is in all references


def test_scores_equal_the_librarys() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    source = Pairs(30)
    written = [texts[-1] + " dog" for texts in source.texts]
    found = score_captions(written, source.texts)
    truth, guess = dict(enumerate(source.texts)), {n: [text] for n, text in enumerate(written)}
    bleu, _ = Bleu(4).compute_score(truth, guess, verbose=0)
    assert [found[f"bleu{n}"] for n in (1, 2, 3, 4)] == bleu
    assert found["rouge-l"] == Rouge().compute_score(truth, guess)[0]
    assert found["cider"] == Cider().compute_score(truth, guess)[0]


def test_an_empty_caption_scores_nothing() -> None:
    found = score_captions(["", "a dog"], [["a dog sits"], ["a dog"]])
    assert found["rouge-l"] == pytest.approx(0.5)
    assert all(math.isfinite(value) for value in found.values())


# The evaluator


def test_captions_of_samples_spread_over_the_split() -> None:
    source = Pairs(40, bad=(39,))
    source.texts[20] = ["!!!"]
    data = eval_data(source, caption_samples=9)
    chosen = torch.linspace(0, 39, 9).round().long().tolist()
    written = write_captions(Twin(source), data)
    assert list(written) == chosen
    assert written[chosen[1]] == source.texts[chosen[1]][-1] + " again"
    found = evaluator("caption").run(subject(source), data)
    used = [index for index in chosen if index not in (39, 20)]
    assert found.num_samples == len(used)
    expected = score_captions([written[i] for i in used], [source.texts[i] for i in used])
    assert found.metrics == expected
    assert found.metrics["cider"] > 1
    assert found.units["cider"] == "CIDEr, 0..10"
    picture = found.pictures["captions"]
    assert picture.size == (6 + 102 + 466, 22 + len(used) * 102 + 6)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    source = Pairs(20)
    data = eval_data(source, batch_size=batch_size, caption_samples=20)
    assert write_captions(Twin(source), data) == {
        index: texts[-1] + " again" for index, texts in enumerate(source.texts)
    }


def test_it_never_asks_for_more_tokens_than_it_says() -> None:
    class Talker(Twin):
        def captions(self, images: torch.Tensor, max_new_tokens: int) -> list[str]:
            return [str(max_new_tokens)] * len(images)

    source = Pairs(4)
    assert set(write_captions(Talker(source), eval_data(source)).values()) == {"32"}


def test_nothing_to_describe_is_an_error() -> None:
    source = Pairs(3)
    source.texts = [["!"], ["?"], ["."]]
    with pytest.raises(DataError, match="no image with captions of pairs could be read"):
        evaluator("caption").run(Subject("twin", (Twin(source),)), eval_data(source))
