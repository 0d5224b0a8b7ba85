"""Which places of a captioning model are targets, on a case worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vlx.ops.text import caption_loss, pad_in_front, real_tokens

END = 0  # also the padding
IDS = torch.tensor([[3, 2, END, END], [1, 2, 3, END]])
LENGTHS = torch.tensor([3, 4])


def mean_loss(*args) -> Tensor:
    total, count = caption_loss(*args)
    return total / count


def logits(prefix: int) -> Tensor:
    return torch.randn(2, prefix + 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prefix", [1, 3])
def test_every_real_token_and_one_end_are_targets(prefix: int) -> None:
    scores = logits(prefix).log_softmax(-1)
    wanted = [(0, 0, 3), (0, 1, 2), (0, 2, END), (1, 0, 1), (1, 1, 2), (1, 2, 3), (1, 3, END)]
    expected = -sum(scores[row, prefix - 1 + place, token] for row, place, token in wanted) / 7
    assert torch.allclose(mean_loss(logits(prefix), IDS, LENGTHS, prefix), expected)


def test_without_a_prefix_the_first_token_is_no_target() -> None:
    scores = logits(0).log_softmax(-1)
    wanted = [(0, 0, 2), (0, 1, END), (1, 0, 2), (1, 1, 3), (1, 2, END)]
    expected = -sum(scores[row, place, token] for row, place, token in wanted) / 5
    assert torch.allclose(mean_loss(logits(0), IDS, LENGTHS, 0), expected)


def test_what_stands_in_padding_and_in_the_prefix_is_never_asked() -> None:
    scores = logits(3)
    other = scores.clone()
    other[:, :2] = 9.0  # places of the prefix before the last
    other[0, -2] = -9.0  # the place of the end token of the shorter caption
    other[:, -1] = 7.0  # nothing follows the last place
    ids = IDS.clone()
    ids[0, 3] = 4
    assert torch.equal(mean_loss(scores, IDS, LENGTHS, 3), mean_loss(other, ids, LENGTHS, 3))


def test_uniform_logits_cost_log_of_the_vocabulary() -> None:
    loss = mean_loss(torch.zeros(2, 7, 5), IDS, LENGTHS, 3)
    assert math.isclose(float(loss), math.log(5), rel_tol=1e-6)


def test_padding_moves_to_the_front_and_order_stays() -> None:
    tokens = torch.arange(10.0).view(2, 5, 1)
    moved, real = pad_in_front(tokens, real_tokens(torch.tensor([2, 4]), 5))
    assert moved[0, 3:, 0].tolist() == [0, 1]
    assert moved[1, 1:, 0].tolist() == [5, 6, 7, 8]
    assert real.tolist() == [[False] * 3 + [True] * 2, [False] + [True] * 4]
