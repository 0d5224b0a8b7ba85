"""Votes of the nearest neighbours, looked for in blocks, against one matrix of similarities.

`python -m benchmarks.knn` compares both; `python -m benchmarks.knn TRAIN TEST WIDTH` classifies at
a size of its own and prints the seconds and the memory that it added. Features are random.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.measure import HEADER, Row, alternate, peak_mib
from vlx.evals.knn import NEIGHBOURS, TEMPERATURE, knn_predict

TRAIN, TEST, WIDTH, CLASSES, ROUNDS = 200_000, 1_024, 384, 1_000, 3


def features(train: int, test: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the training split (N, D), their classes (N,), and of the test split (M, D)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (train,), generator=generator)
    return (
        torch.randn(train, width, generator=generator),
        labels,
        torch.randn(test, width, generator=generator),
    )


def at_once(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """As the DINO protocol is mostly written: all similarities of a block of the test split."""
    similarity = normalize(test, dim=1) @ normalize(train, dim=1).T
    best, index = similarity.topk(NEIGHBOURS, dim=1)
    votes = torch.zeros(len(test), CLASSES)
    return votes.scatter_add_(1, labels[index], (best / TEMPERATURE).exp()).argmax(1)


def main() -> list[Row]:
    given = features(TRAIN, TEST, WIDTH)
    held = peak_mib()
    ours = knn_predict(*given, CLASSES)
    blocks = peak_mib() - held
    peer = at_once(*given)
    whole = peak_mib() - held
    assert torch.equal(ours, peer)
    seconds = alternate(
        lambda: knn_predict(*given, CLASSES), lambda: at_once(*given), rounds=ROUNDS, warmup=0
    )
    size, name = f"{TEST:,} of {TRAIN:,} rows, width {WIDTH}", "one matrix"
    return [
        Row(f"k-NN: {size}", *seconds, "s", name, "< 1.1"),
        Row(f"memory for the k-NN of {size}", blocks, whole, "MiB", name, "< 1"),
    ]


def large(train: int, test: int, width: int) -> str:
    given = features(train, test, width)
    held, start = peak_mib(), time.perf_counter()
    knn_predict(*given, CLASSES)
    seconds, added = time.perf_counter() - start, peak_mib() - held
    return (
        f"{test:,} of {train:,} rows, width {width}: {seconds:,.0f} s on "
        f"{torch.get_num_threads()} threads, {added:,.0f} MiB beside {held:,.0f} MiB held before"
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        print(large(*(int(word) for word in sys.argv[1:])))
    else:
        print("\n".join([HEADER, *(row.markdown() for row in main())]))
