"""Ranks the best candidates of a dual encoder again by a score of each pair."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from vlx.core.capability import PairScorer
from vlx.evals.base import EvalData, Subject
from vlx.evals.corpus import Corpus
from vlx.evals.ranking import top_k


def rerank(
    subject: Subject, data: EvalData, corpus: Corpus, ranks: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """New ranks (N,) of images' captions and (M,) of captions' images.

    ranks: the dual encoder's, kept by queries whose own item is not among their candidates, the
    `eval.rerank` most similar ones.
    """
    k, count = data.cfg.rerank, len(corpus.texts)
    every = torch.arange(len(corpus.images), device=corpus.owner.device)
    captions, _ = top_k(corpus.images, corpus.text_features, corpus.text, k)  # (N, k)
    images, _ = top_k(corpus.text_features, corpus.images, every, k)  # (U, k)
    # Every (image, text) that is a candidate in either direction, once, by image: (P,).
    of_images = every[:, None] * count + corpus.text[captions]
    of_texts = images * count + torch.arange(count, device=images.device)[:, None]
    pairs = torch.unique(torch.cat([of_images.flatten(), of_texts.flatten()]))
    scores = _score(subject.get(PairScorer), data, corpus, pairs)

    def scores_of(wanted: Tensor) -> Tensor:
        return scores[torch.searchsorted(pairs, wanted)]

    own_captions = corpus.owner[captions] == every[:, None]
    own_images = images[corpus.text] == corpus.owner[:, None]
    return (
        new_ranks(scores_of(of_images), own_captions, ranks[0]),
        new_ranks(scores_of(of_texts)[corpus.text], own_images, ranks[1]),
    )


def new_ranks(scores: Tensor, own: Tensor, before: Tensor) -> Tensor:
    """(Q,) from scores (Q, k) of candidates and whether they are the query's own (Q, k)."""
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    place = 1 + (~(scores < best) & ~own).sum(1)
    return torch.where(own.any(1), place, before.clamp(min=scores.shape[1] + 1))


def _score(scorer: PairScorer, data: EvalData, corpus: Corpus, pairs: Tensor) -> Tensor:
    """(P,) scores of pairs, ascending image row * U + text row; each image is read once, and each
    process scores the pairs of its share."""
    count, size = len(corpus.texts), data.cfg.batch_size
    scores = torch.full((len(pairs),), -torch.inf, device=data.device)
    for batch in data.pipeline("test").batches():
        rows, place = _rows(corpus.sample_id, batch["sample_id"])
        start = torch.searchsorted(pairs, rows * count)
        end = torch.searchsorted(pairs, (rows + 1) * count)
        number = torch.repeat_interleave(end - start)  # row of the batch of each pair
        which = start[number] + _counted(end - start)
        for part in range(0, _most(len(number), data), size):
            # A process that is through repeats its last pairs: sharded weights need all of them.
            last = max(0, min(part, len(number) - 1) // size * size)
            some, at = number[last : last + size], which[last : last + size]
            if len(at):
                texts = [corpus.texts[text] for text in (pairs[at] % count).tolist()]
                scores[at] = scorer.pair_scores(batch["image"][place[some]], texts).float()
    if data.world > 1:
        dist.all_reduce(scores, op=dist.ReduceOp.MAX)
    return scores


def _rows(known: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in `known`, ascending, of those `ids` that are in it, and their places in `ids`."""
    row = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
    place = (known[row] == ids).nonzero()[:, 0]
    return row[place], place


def _counted(lengths: Tensor) -> Tensor:
    """0, 1, ... for each length, one after the other."""
    start = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=lengths.device) - start.repeat_interleave(
        lengths
    )


def _most(count: int, data: EvalData) -> int:
    """The largest count of all processes."""
    if data.world == 1:
        return count
    value = torch.tensor(count, device=data.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
