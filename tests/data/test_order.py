"""The order of an epoch: a permutation, another for every epoch and seed."""

from __future__ import annotations

import numpy as np
import pytest

from vlx.data.order import balanced, permute, repeated, replacement


@pytest.mark.parametrize(
    "n", [1, 2, 3, 4, 5, 7, 15, 16, 17, 63, 64, 65, 255, 1000, 1024, 4097, 50_000, 131_071]
)
def test_every_sample_once(n: int) -> None:
    for seed, epoch in ((0, 0), (3, 1)):
        order = permute(np.arange(n), n, seed, epoch)
        np.testing.assert_array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("n", range(1, 70))
def test_every_small_set_is_permuted(n: int) -> None:
    for epoch in range(3):
        assert sorted(permute(np.arange(n), n, 5, epoch).tolist()) == list(range(n))


def test_a_position_does_not_depend_on_what_is_asked_with_it() -> None:
    whole = permute(np.arange(1000), 1000, 1, 2)
    for part in (np.array([7]), np.array([999, 3]), np.arange(500, 600)):
        np.testing.assert_array_equal(permute(part, 1000, 1, 2), whole[part])


def test_epochs_and_seeds_differ() -> None:
    orders = [permute(np.arange(500), 500, seed, epoch) for seed in range(4) for epoch in range(4)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            # Two random orders share one place in expectation.
            assert (a == b).sum() < 10


def test_very_large_sets_cost_no_memory() -> None:
    n = 10**12
    order = permute(np.arange(1000), n, 0, 0)
    assert order.min() >= 0
    assert order.max() < n
    assert len(set(order.tolist())) == 1000


@pytest.mark.parametrize("n", [10, 37])
def test_every_sample_is_equally_likely_at_every_place(n: int) -> None:
    epochs = 2000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), permute(np.arange(n), n, 0, epoch)] += 1
    expected = epochs / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    # Chi-square has mean f and variance 2f; five deviations is one false alarm in millions.
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_are_not_kept_together() -> None:
    order = permute(np.arange(10_000), 10_000, 0, 0)
    assert (np.abs(np.diff(order)) == 1).mean() < 0.001
    correlation = np.corrcoef(np.arange(10_000), order)[0, 1]
    assert abs(correlation) < 0.05  # five deviations of 1 / sqrt(n)


def test_known_values_stay_what_they_were() -> None:
    """A resumed run of an older version must go on with the same samples."""
    assert permute(np.arange(8), 100, 0, 0).tolist() == [25, 61, 65, 36, 69, 8, 75, 42]


def test_a_replacement_is_a_function_of_its_arguments_and_in_range() -> None:
    drawn = [replacement(i, 50, 0, e, a) for i in range(20) for e in range(3) for a in range(3)]
    assert drawn == [
        replacement(i, 50, 0, e, a) for i in range(20) for e in range(3) for a in range(3)
    ]
    assert min(drawn) >= 0
    assert max(drawn) < 50
    assert len(set(drawn)) > 30


@pytest.mark.parametrize(("n", "repeats"), [(12, 3), (13, 3), (1000, 4), (5, 8), (1, 3)])
def test_an_epoch_of_repeats_has_its_length_and_every_copy_once(n: int, repeats: int) -> None:
    index, copy = repeated(np.arange(n), n, 0, 1, repeats)
    assert len(index) == n
    pairs = list(zip(index.tolist(), copy.tolist()))
    assert len(set(pairs)) == n
    samples, counts = np.unique(index, return_counts=True)
    assert len(samples) == -(-n // repeats)
    assert sorted(counts.tolist(), reverse=True)[:-1] == [repeats] * (len(samples) - 1)
    for sample in samples:  # neighbours, numbered from 0
        places = np.flatnonzero(index == sample)
        np.testing.assert_array_equal(places, places[0] + np.arange(len(places)))
        np.testing.assert_array_equal(copy[places], np.arange(len(places)))
    np.testing.assert_array_equal(index[::repeats], permute(np.arange(len(samples)), n, 0, 1))


def test_one_repeat_is_the_order_itself() -> None:
    index, copy = repeated(np.arange(500), 500, 3, 2, 1)
    np.testing.assert_array_equal(index, permute(np.arange(500), 500, 3, 2))
    assert not copy.any()


def test_a_repeated_position_does_not_depend_on_what_is_asked_with_it() -> None:
    whole = repeated(np.arange(1000), 1000, 1, 2, 3)
    for part in (np.array([7]), np.array([999, 3]), np.arange(500, 600)):
        for mine, all_of_it in zip(repeated(part, 1000, 1, 2, 3), whole):
            np.testing.assert_array_equal(mine, all_of_it[part])


def test_repeats_show_every_sample_over_the_epochs() -> None:
    n, repeats, epochs = 300, 3, 40
    seen = [set(repeated(np.arange(n), n, 0, e, repeats)[0].tolist()) for e in range(epochs)]
    assert seen[0] != seen[1]
    assert set().union(*seen) == set(range(n))  # a sample is missed with probability (2/3)^40


# Three domains of 7, 2 and 7 samples, not in order.
DOMAINS = [np.arange(0, 14, 2), np.array([14, 15]), np.arange(1, 14, 2)]


def test_every_batch_has_equally_many_of_each_domain_and_each_goes_round_by_itself() -> None:
    index, rounds = balanced(np.arange(3 * 42), DOMAINS, 5)
    for batch in index.reshape(-1, 6):
        assert [int(np.isin(batch, own).sum()) for own in DOMAINS] == [2, 2, 2]
    for own, times in zip(DOMAINS, (6, 21, 6)):
        seen, when = index[np.isin(index, own)], rounds[np.isin(index, own)]
        np.testing.assert_array_equal(when, np.repeat(np.arange(times), len(own)))
        for lap in seen.reshape(times, len(own)):
            np.testing.assert_array_equal(np.sort(lap), own)
        assert len({tuple(lap) for lap in seen.reshape(times, len(own)).tolist()}) > 1


def test_domains_of_one_size_have_orders_of_their_own() -> None:
    index, _ = balanced(np.arange(0, 300), [np.arange(100), np.arange(100, 200)], 0)
    assert (index[::2] == index[1::2] - 100).mean() < 0.1


def test_a_balanced_position_does_not_depend_on_what_is_asked_with_it() -> None:
    whole = balanced(np.arange(1000), DOMAINS, 1)
    for part in (np.array([7]), np.array([999, 3]), np.arange(500, 600)):
        for mine, all_of_it in zip(balanced(part, DOMAINS, 1), whole):
            np.testing.assert_array_equal(mine, all_of_it[part])
