"""Ring queues: what they hold, where the next column goes, what they refuse."""

from __future__ import annotations

import pytest
import torch

from vlx.blocks.queue import FeatureQueue, RingQueue
from vlx.core.errors import ConfigError


def rows(count: int, value: float) -> torch.Tensor:
    return torch.full((count, 2), value)


def test_the_newest_rows_replace_the_oldest_columns_in_a_ring() -> None:
    queue = RingQueue(torch.zeros(2, 6))
    for step in range(1, 6):
        queue.enqueue(rows(2, step))
        assert queue.pointer == 2 * step % 6
    assert queue.columns[0].tolist() == [4, 4, 5, 5, 3, 3]
    assert torch.equal(queue.columns[0], queue.columns[1])


def test_a_row_becomes_a_column_in_its_order() -> None:
    queue, sent = RingQueue(torch.zeros(3, 4)), torch.arange(6.0).view(2, 3)
    queue.enqueue(sent)
    assert torch.equal(queue.columns[:, :2], sent.T)
    assert queue.columns[:, 2:].eq(0).all()


def test_it_holds_numbers_of_another_type_and_no_gradient() -> None:
    queue = RingQueue(torch.full((1, 4), -100))
    queue.enqueue(torch.tensor([[3], [7]]))
    assert queue.columns.tolist() == [[3, 7, -100, -100]]
    features = RingQueue(torch.zeros(2, 4))
    features.enqueue(torch.ones(2, 2, requires_grad=True) * 2)
    assert not features.columns.requires_grad


def test_columns_are_unit_vectors_and_a_saved_queue_continues() -> None:
    queue = FeatureQueue(8, 12)
    torch.testing.assert_close(queue.columns.norm(dim=0), torch.ones(12))
    queue.enqueue(torch.ones(4, 8))
    other = FeatureQueue(8, 12)
    other.load_state_dict(queue.state_dict())
    for one in (queue, other):
        one.enqueue(torch.full((4, 8), 2.0))
    assert torch.equal(queue.columns, other.columns)
    assert other.pointer == 8


def test_a_size_that_a_step_does_not_divide_is_refused_with_one_that_it_does() -> None:
    queue = FeatureQueue(4, 100)
    with pytest.raises(ConfigError, match=r"queue_size=100 .* 32 samples .*queue_size=96"):
        queue.check(32)
    with pytest.raises(ConfigError, match=r"use method\.queue_size=128"):
        queue.enqueue(torch.ones(128, 4))
    queue.check(25)
