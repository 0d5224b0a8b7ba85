"""ALBEF's rule for captions, by hand-worked cases."""

from __future__ import annotations

import pytest

from vlx.core.caption import clean_albef


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A Dog, on the sofa.", "a dog on the sofa"),
        ("a black-and-white cat / kitten", "a black and white cat kitten"),
        ("<PERSON>'s hat (red); really?", "persons hat red really"),
        ("  two   spaces\t\tand tabs ", "two spaces and tabs"),
        ('the "best": #1 ~ * photo!', "the best 1 photo"),
        ("crème brûlée & tea_time @home", "crème brûlée & tea_time @home"),
    ],
)
def test_the_rule(caption: str, expected: str) -> None:
    assert clean_albef(caption) == expected


def test_thirty_words_are_kept() -> None:
    assert clean_albef(" ".join(map(str, range(40)))) == " ".join(map(str, range(30)))
