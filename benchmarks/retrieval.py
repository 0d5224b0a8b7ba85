"""Ranks of retrieval, counted in blocks, against sorting the whole matrix of similarities.

`python -m benchmarks.retrieval` compares both at the size of COCO's test split, 5,000 images and
25,000 captions. `python -m benchmarks.retrieval IMAGES CAPTIONS WIDTH` counts ranks at a size whose
matrix fits no memory and prints the seconds and the memory that counting added. Embeddings are
random unit vectors.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.measure import HEADER, Row, alternate, peak_mib
from vlx.evals.ranking import count_ranks

IMAGES, CAPTIONS, WIDTH, ROUNDS = 5_000, 25_000, 256, 3


def embeddings(images: int, captions: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `count_ranks` takes them, captions a little closer to their own images than to others."""
    generator = torch.Generator().manual_seed(0)
    pictures = normalize(torch.randn(images, width, generator=generator), dim=1)
    owner = torch.arange(captions) % images
    texts = torch.randn(captions, width, generator=generator)
    texts.mul_(0.5).add_(pictures[owner])
    return pictures, normalize(texts, dim=1), owner, torch.arange(captions)


def sorted_ranks(images: Tensor, texts: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """What open_clip's evaluation does: the place of the own one in an argsort of a whole row."""
    scores = images @ texts.T
    found = owner[scores.argsort(dim=1, descending=True)] == torch.arange(len(images))[:, None]
    by_image = found.int().argmax(1) + 1
    order = scores.T.argsort(dim=1, descending=True)
    return by_image, (order == owner[:, None]).int().argmax(1) + 1


def main() -> list[Row]:
    images, texts, owner, text = embeddings(IMAGES, CAPTIONS, WIDTH)
    held = peak_mib()
    ranks = count_ranks(images, texts, owner, text)
    blocks = peak_mib() - held
    expected = sorted_ranks(images, texts, owner)
    whole = peak_mib() - held
    for own, other in zip((ranks.text_to_image, ranks.image_to_text), reversed(expected)):
        assert torch.equal(own <= 10, other <= 10)
    ours, peer = alternate(
        lambda: count_ranks(images, texts, owner, text),
        lambda: sorted_ranks(images, texts, owner),
        rounds=ROUNDS,
        warmup=0,
    )
    size, name = f"{IMAGES:,} images, {CAPTIONS:,} captions", "one matrix, argsort"
    return [
        Row(f"ranks of {size}, width {WIDTH}", ours, peer, "s", name, "< 1"),
        Row(f"memory for the ranks of {size}", blocks, whole, "MiB", name, "< 1"),
    ]


def large(images: int, captions: int, width: int) -> str:
    given = embeddings(images, captions, width)
    held, start = peak_mib(), time.perf_counter()
    ranks = count_ranks(*given)
    seconds, added = time.perf_counter() - start, peak_mib() - held
    recall = float((ranks.text_to_image <= 1).double().mean())
    return (
        f"{images:,} images x {captions:,} captions, width {width}: {seconds:,.0f} s on "
        f"{torch.get_num_threads()} threads, {added:,.0f} MiB beside {held:,.0f} MiB held before; "
        f"text to image R@1 {recall:.4f}"
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        print(large(*(int(word) for word in sys.argv[1:])))
    else:
        print("\n".join([HEADER, *(row.markdown() for row in main())]))
