"""Retrieval: images by their captions and captions by their images."""

from __future__ import annotations

import logging

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlx.core.capability import DualEncoder, PairScorer
from vlx.evals.base import EvalData, Evaluation, Subject
from vlx.evals.corpus import Corpus, read_corpus
from vlx.evals.pictures import BLACK, GREEN, GREY, WHITE, framed, grid, text_panel, to_picture
from vlx.evals.ranking import count_ranks, top_k
from vlx.evals.rerank import rerank

log = logging.getLogger("vlx")
_AT = (1, 5, 10)
_QUERIES = 6
_SHOWN = 5
_TEXTS = 460
_QUERY = 220


class Retrieval:
    """Protocol retrieval@1: all readable images of the test split with all their captions, the
    deterministic central view, cosine similarity summed in float64 and rounded to float32.

    Image to text (i2t): the rank of the best of an image's own captions among all captions of
    the split; its other own captions take no place. Text to image (t2i): the rank of a caption's
    own image among all images. Ranks start at 1, a tie counts against the model. r1, r5, r10 are
    the shares of queries with a rank of at most 1, 5, 10; median-rank the median over queries
    (the mean of the middle two of an even number). Own is what the data pairs by index: the same
    text at another image is a wrong one, and ties. `duplicate-captions` is the share of captions
    whose text (the exact string) is in the split more than once, and the `-by-text` metrics count
    an item as own where it is paired with an equal text.

    With `eval.rerank` = k > 0 and a model that scores pairs: the k most similar candidates of
    each query are ranked again by that score alone, ties against the model; a query whose own
    item is not among them keeps its rank, at least k + 1 (`reranked-`).
    """

    name = "retrieval"
    version = 1
    requires = (DualEncoder,)
    needs_labels = False
    needs_captions = True

    @torch.no_grad()
    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        info = data.source("test").info
        corpus = read_corpus(subject, data)
        ranks = count_ranks(
            corpus.images, corpus.text_features, corpus.owner, corpus.text,
            rank=data.rank, world=data.world,
        )  # fmt: skip
        found = Evaluation(
            split=f"{info.name}/{info.split}",
            num_samples=len(corpus.images),
            lists={"captions": [len(corpus.owner)]},
        )
        _note(found, "i2t", ranks.image_to_text)
        _note(found, "t2i", ranks.text_to_image)
        found.metrics["i2t-r1-by-text"] = _recall(ranks.image_to_text_by_text, 1)
        found.metrics["t2i-r1-by-text"] = _recall(ranks.text_to_image_by_text, 1)
        often = torch.bincount(corpus.text)[corpus.text] > 1
        found.metrics["duplicate-captions"] = float(often.double().mean())
        if data.cfg.rerank and subject.has(PairScorer):
            again = rerank(subject, data, corpus, (ranks.image_to_text, ranks.text_to_image))
            _note(found, "reranked-i2t", again[0])
            _note(found, "reranked-t2i", again[1])
        elif data.cfg.rerank:
            log.info(f"retrieval not re-ranked: {subject.name} does not score pairs")
        found.pictures = {
            "retrieval-image-to-text": _texts_of_images(data, corpus),
            "retrieval-text-to-image": _images_of_texts(data, corpus),
        }
        return found


def _recall(ranks: Tensor, at: int) -> float:
    return float((ranks <= at).double().mean())


def _note(found: Evaluation, way: str, ranks: Tensor) -> None:
    for at in _AT:
        found.metrics[f"{way}-r{at}"] = _recall(ranks, at)
    found.metrics[f"{way}-median-rank"] = float(np.median(ranks.cpu().numpy()))
    found.units[f"{way}-median-rank"] = "rank, 1 is best"


def _evenly(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(_QUERIES, count)).round().long()


def _texts_of_images(data: EvalData, corpus: Corpus) -> Image.Image:
    """A row an image: the captions found for it, own ones framed green."""
    chosen = _evenly(len(corpus.images)).to(corpus.owner.device)
    found, scores = top_k(corpus.images[chosen], corpus.text_features, corpus.text, _SHOWN)
    images = data.images("test", corpus.sample_id[chosen].tolist())
    rows = []
    for query, image, captions, values in zip(chosen, images, found, scores.tolist()):
        picture = to_picture(image)
        own = (corpus.owner[captions] == query).tolist()
        texts = [
            (f"{value:.2f}  {corpus.texts[text]}", GREEN if right else GREY)
            for text, value, right in zip(corpus.text[captions].tolist(), values, own)
        ]
        rows.append([picture, text_panel(texts, width=_TEXTS, height=picture.height, frames=True)])
    return grid(rows, [(0, "image"), (1, "nearest captions; its own are green")])


def _images_of_texts(data: EvalData, corpus: Corpus) -> Image.Image:
    """A row a caption: the images found for it, its own framed green."""
    chosen = _evenly(len(corpus.owner)).to(corpus.owner.device)
    queries = corpus.text_features[corpus.text[chosen]]
    every = torch.arange(len(corpus.images), device=corpus.owner.device)
    found, _ = top_k(queries, corpus.images, every, _SHOWN)
    images = data.images("test", corpus.sample_id[found.flatten()].tolist())
    rows = []
    for caption, around, pixels in zip(chosen, found, images.unflatten(0, found.shape)):
        own = (around == corpus.owner[caption]).tolist()
        pictures = [
            framed(to_picture(image), GREEN if right else WHITE)
            for image, right in zip(pixels, own)
        ]
        words = [(corpus.texts[int(corpus.text[caption])], BLACK)]
        rows.append([text_panel(words, width=_QUERY, height=pictures[0].height), *pictures])
    return grid(rows, [(0, "caption"), (1, "nearest images; its own is green")])
