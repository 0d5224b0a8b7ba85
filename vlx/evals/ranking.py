"""Ranks of images and texts by their similarity, counted in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_BYTES = 64 << 20
_BYTES_A_SCORE = 16  # float64, float32, and the comparisons with their negation


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """(A, E) and (B, E) to their (A, B) products in float32.

    Summed in float64 and rounded once: neither the size of a block nor the order in which a
    library sums (or TF32) then decides the last bit, so that equal texts tie exactly.
    """
    return (a.double() @ b.double().T).float()


@dataclass(frozen=True)
class Ranks:
    """1 is best. A tie counts against the model, and so does a similarity that is no number."""

    image_to_text: Tensor
    """(N,) int64: of the best of an image's own captions among all captions but its other ones."""
    text_to_image: Tensor
    """(M,) int64: of a caption's own image among all images."""
    image_to_text_by_text: Tensor
    """(N,): a caption of another image counts as own where its text is that of an own one."""
    text_to_image_by_text: Tensor
    """(M,): an image counts as own where one of its captions is the same text."""


def count_ranks(
    images: Tensor,
    texts: Tensor,
    owner: Tensor,
    text: Tensor,
    *,
    block_bytes: int = BLOCK_BYTES,
    rank: int = 0,
    world: int = 1,
) -> Ranks:
    """Ranks of N images and M captions; never holds more than one block of their similarities.

    images: (N, E); texts: (U, E), the distinct texts; owner, text: (M,) int64, rows of the image
    and of the text of each caption. Every image has a caption. Of several processes each counts
    its share of the blocks.
    """
    own = _own_similarity(images, texts, owner, text, block_bytes)  # (M,)
    best = own.new_full((len(images),), -torch.inf).scatter_reduce(0, owner, own, "amax")  # (N,)
    others, reached = owner.new_zeros(len(images)), owner.new_zeros(len(owner))
    side = _side(block_bytes)
    for start in range(rank * side, len(images), side * world):
        rows = slice(start, start + side)
        block = images[rows]
        for first in range(0, len(owner), side):
            columns = slice(first, first + side)
            found = similarity(block, texts[text[columns]])
            place = owner[columns] - start
            column = ((place >= 0) & (place < len(block))).nonzero()[:, 0]
            place = place[column]
            # "not less" also holds of what is no number.
            at_least = ~(found < best[rows, None])
            at_least[place, column] = False
            others[rows] += at_least.sum(1)
            at_least = ~(found < own[None, columns])
            at_least[place, column] = True
            reached[columns] += at_least.sum(0)
    if world > 1:
        dist.all_reduce(others)
        dist.all_reduce(reached)
    return _by_text(others, reached, own, best, owner, text)


def _own_similarity(
    images: Tensor, texts: Tensor, owner: Tensor, text: Tensor, block_bytes: int
) -> Tensor:
    """(M,) of each caption and its own image, rounded as `similarity` rounds."""
    rows = max(1, block_bytes // (images.shape[1] * 8 * 3))  # two operands and their product
    found = [
        (images[i].double() * texts[t].double()).sum(1).float()
        for i, t in zip(owner.split(rows), text.split(rows))
    ]
    return torch.cat(found)


def _by_text(
    others: Tensor, reached: Tensor, own: Tensor, best: Tensor, owner: Tensor, text: Tensor
) -> Ranks:
    """The ranks from what was counted: captions of other images that are at least as similar as an
    image's best own one (N,), images at least as similar as a caption's own (M,), itself included.

    Equal texts have equal similarities, so that what counts as own by its text is what ties.
    """
    count = int(text.max()) + 1
    # Each image with each of its distinct texts: (P,).
    pair, of_caption, times = torch.unique(
        owner * count + text, return_inverse=True, return_counts=True
    )
    image_of, text_of = pair // count, pair % count
    similar = own.new_zeros(len(pair)).scatter_(0, of_caption, own)
    elsewhere = torch.bincount(text, minlength=count)[text_of] - times
    copies = torch.zeros_like(others).index_add_(
        0, image_of, elsewhere * (similar == best[image_of])
    )
    highest = own.new_full((count,), -torch.inf).scatter_reduce(0, text_of, similar, "amax")
    tied = others.new_zeros(count).index_add_(
        0, text_of, (similar == highest[text_of]).to(others.dtype)
    )
    fewest = reached.new_full((count,), len(others)).scatter_reduce(0, text, reached, "amin")
    return Ranks(
        image_to_text=1 + others,
        text_to_image=reached,
        image_to_text_by_text=(1 + others - copies).clamp(min=1),
        text_to_image_by_text=(1 + fewest - tied).clamp(min=1)[text],
    )


def top_k(
    queries: Tensor, keys: Tensor, key: Tensor, k: int, block_bytes: int = BLOCK_BYTES
) -> tuple[Tensor, Tensor]:
    """The k most similar candidates of each query, best first, and their similarities: (Q, k).

    queries: (Q, E); keys: (K, E); key: (C,) int64, the row of each candidate in `keys`.
    """
    side = _side(block_bytes)
    found = []
    for block in queries.split(side):
        best = block.new_full((len(block), 0), 0.0, dtype=torch.float32)
        at = key.new_zeros(len(block), 0)
        for start in range(0, len(key), side):
            some = similarity(block, keys[key[start : start + side]]).nan_to_num(nan=-torch.inf)
            value, place = some.topk(min(k, some.shape[1]), dim=1)
            best, at = torch.cat([best, value], 1), torch.cat([at, place + start], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            at = at.gather(1, order)
        found.append((at, best))
    at, best = (torch.cat(part) for part in zip(*found))
    return at, best


def _side(block_bytes: int) -> int:
    """Rows and columns of a square block of scores."""
    return max(1, isqrt(block_bytes // _BYTES_A_SCORE))
