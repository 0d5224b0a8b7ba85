"""The order of an epoch as a pure function, in constant memory.

A Feistel network over the next power of four permutes 0..n-1; values outside are walked on
(Black and Rogaway, 2002). Any position of any epoch costs the same, so resuming needs no replay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 6


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Sample indices at `positions (K,)` of the epoch's order of n samples, int64."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    base = _mix(np.array([seed], dtype=np.uint64) * np.uint64(0x2545F4914F6CDD1D))
    keys = [_mix(base + np.uint64((epoch * _ROUNDS + r) & (2**64 - 1))) for r in range(_ROUNDS)]

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> shift, x & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & low)
        return (left << shift) | right

    with np.errstate(over="ignore"):
        x = encrypt(np.asarray(positions).astype(np.uint64))
        outside = x >= n
        while outside.any():
            x[outside] = encrypt(x[outside])
            outside = x >= n
    return x.astype(np.int64)


def repeated(
    positions: np.ndarray, n: int, seed: int, epoch: int, repeats: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sample indices and copy numbers 0..repeats-1 at `positions (K,)`, both int64.

    Repeated augmentation (Hoffer 2020): an epoch of n positions has `repeats` copies of each of its
    first n / repeats samples, next to each other, so that a global batch holds all copies of nearly
    all of its samples; which process takes which is `Share.positions`. 1 is `permute`.
    """
    sample, copy = np.divmod(np.asarray(positions).astype(np.int64), repeats)
    return permute(sample, n, seed, epoch), copy


def balanced(
    positions: np.ndarray, domains: Sequence[np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sample indices and rounds at `positions (K,)` of a whole run, both int64.

    domains: the samples of each, none empty. The run takes one sample of each in turn, so that a
    batch of a multiple of their number has equally many. Each domain goes round by itself, in
    another order every time; the round says how often the sample has been seen before.
    """
    turn, domain = np.divmod(np.asarray(positions).astype(np.int64), len(domains))
    index, rounds = np.empty_like(turn), np.empty_like(turn)
    for number, own in enumerate(domains):
        at = np.flatnonzero(domain == number)
        rounds[at], place = np.divmod(turn[at], len(own))
        for r in np.unique(rounds[at]).tolist():
            now = rounds[at] == r
            # A number of its own: domains of one size would else go through the same places.
            order = permute(place[now], len(own), seed, r * len(domains) + number)
            index[at[now]] = own[order]
    return index, rounds


def replacement(index: int, n: int, seed: int, epoch: int, attempt: int) -> int:
    """The sample that stands in for an unreadable one; the same on every machine."""
    with np.errstate(over="ignore"):
        x = _mix(np.array([index], dtype=np.uint64) + np.uint64(seed * 1_000_003 + epoch))
        x = _mix(x + np.uint64(attempt))
    return int(x[0] % np.uint64(n))
