"""`data.variant`'s key=value words, and captions swapped by share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from vlx.core.errors import DataError
from vlx.data.noise import swapped
from vlx.data.variant import check_range, parse_variant


@dataclass(frozen=True)
class Options:
    faces: tuple[str, ...] = ("A",)
    side: int = 64
    noise: float = 0.0


def test_values_read_as_their_defaults_types() -> None:
    assert parse_variant(None, Options()) == Options()
    read = parse_variant(" faces=A+B, noise=0.2,side=32 ,", Options())
    assert read == Options(("A", "B"), 32, 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nois=0.2", "no key 'nois'. Did you mean noise?"),
        ("side", "'side' has no value: write side=VALUE"),
        ("side=", "'side' has no value"),
        ("side=64,side=32", "'side' is given twice"),
        ("side=3.5", "side=3.5 is not a whole number, e.g. 64"),
        ("noise=much", "noise=much is not a number"),
    ],
)
def test_a_mistake_is_named_with_what_to_type(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("?", r"\?")):
        parse_variant(text, Options())


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_value_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"noise=.* is outside 0 to 1"):
        check_range("noise", value, 0, 1)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 1.0])
def test_the_stated_share_carries_another_samples_caption(share: float) -> None:
    partner = swapped(500, share)
    assert (partner != np.arange(500)).sum() == round(share * 500)
    assert sorted(partner) == list(range(500))  # every caption is still there once
    np.testing.assert_array_equal(partner, swapped(500, share))


def test_more_noise_adds_to_less() -> None:
    less, more = (swapped(500, share) != np.arange(500) for share in (0.2, 0.4))
    assert (more | ~less).all()
    assert (swapped(500, 0.2, seed=1) != swapped(500, 0.2)).any()
