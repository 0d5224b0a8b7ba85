"""`vlx eval retrieval` against torchmetrics and brute force, blocks, ties, equal texts."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

from tests.evals.twin import Pairs, Twin, eval_data, subject
from vlx.core.errors import DataError
from vlx.evals import ranking
from vlx.evals.base import Subject
from vlx.evals.corpus import read_corpus
from vlx.evals.ranking import Ranks, count_ranks, similarity, top_k
from vlx.evals.registry import evaluator

N, E = 60, 16
FIELDS = ("image_to_text", "text_to_image", "image_to_text_by_text", "text_to_image_by_text")


def draw(
    seed: int = 0, *, per_image: int = 4, distinct: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, E), texts (U, E), owner (M,) and text (M,)."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, per_image + 1, (N,), generator=generator)
    owner = torch.repeat_interleave(counts)
    owner = owner[torch.randperm(len(owner), generator=generator)]
    images = normalize(torch.randn(N, E, generator=generator), dim=1)
    if distinct is None:
        text = torch.arange(len(owner))
        texts = images[owner] + 0.5 * torch.randn(len(owner), E, generator=generator)
    else:
        text = torch.randint(0, distinct, (len(owner),), generator=generator)
        text = torch.unique(text, return_inverse=True)[1]
        texts = torch.randn(int(text.max()) + 1, E, generator=generator)
    return images, normalize(texts, dim=1), owner, text


def brute(images: Tensor, texts: Tensor, owner: Tensor, text: Tensor) -> Ranks:
    """The protocol word by word, on the whole matrix."""
    scores = similarity(images, texts)[:, text].numpy()  # (N, M)
    i2t, t2i, i2t_by, t2i_by = [], [], [], []
    for image, row in enumerate(scores):
        own = (owner == image).numpy()
        i2t.append(1 + int((row[~own] >= row[own].max()).sum()))
        same = torch.isin(text, text[owner == image]).numpy()
        i2t_by.append(1 + int((row[~same] >= row[same].max()).sum()))
    for caption, column in enumerate(scores.T):
        own = np.arange(len(images)) == int(owner[caption])
        t2i.append(1 + int((column[~own] >= column[own]).sum()))
        same = np.isin(np.arange(len(images)), owner[text == text[caption]].numpy())
        t2i_by.append(1 + int((column[~same] >= column[same].max()).sum()))
    return Ranks(*(torch.tensor(ranks) for ranks in (i2t, t2i, i2t_by, t2i_by)))


def assert_equal(found: Ranks, expected: Ranks) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("side", [1, 3, 7, 64, 1000])
@pytest.mark.parametrize("distinct", [None, 25, 1])
def test_ranks_equal_brute_force_in_blocks_of_any_size(side: int, distinct: int | None) -> None:
    parts = draw(distinct=distinct)
    assert_equal(count_ranks(*parts, block_bytes=side * side * 16), brute(*parts))


def test_recalls_equal_torchmetrics() -> None:
    images, texts, owner, text = draw(1)
    ranks = count_ranks(images, texts, owner, text)
    scores = similarity(images, texts)[:, text]
    target = owner[None, :] == torch.arange(N)[:, None]
    query = torch.arange(N)[:, None].expand_as(scores)
    caption = torch.arange(len(owner))[None, :].expand_as(scores)
    for k in (1, 5, 10):
        # One image belongs to a caption, so its recall is the hit rate; of several captions of an
        # image one is enough, which is the hit rate alone.
        hit = RetrievalHitRate(top_k=k)(scores.flatten(), target.flatten(), query.flatten())
        recall = RetrievalRecall(top_k=k)(
            scores.T.flatten(), target.T.flatten(), caption.T.flatten()
        )
        assert float((ranks.image_to_text <= k).float().mean()) == float(hit)
        assert float((ranks.text_to_image <= k).float().mean()) == float(recall)


def test_ties_and_what_is_no_number_count_against_the_model() -> None:
    images, texts, owner, text = draw(2)
    same = count_ranks(images[:1].expand(N, E), texts[:1].expand(len(texts), E), owner, text)
    captions = torch.bincount(owner)
    assert torch.equal(same.image_to_text, 1 + len(owner) - captions)
    assert (same.text_to_image == N).all()
    lost = count_ranks(torch.full((N, E), torch.nan), texts, owner, text)
    assert torch.equal(lost.image_to_text, 1 + len(owner) - captions)
    assert (lost.text_to_image == N).all()
    assert (lost.image_to_text_by_text > 1).all()


def test_scores_do_not_depend_on_who_else_is_in_the_block() -> None:
    a, b = draw(3)[:2]
    whole = similarity(a, b)
    for rows, columns in ((1, 1), (1, 50), (7, 3)):
        assert torch.equal(similarity(a[:rows], b[:columns]), whole[:rows, :columns])


def test_no_block_is_larger_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """100k images with 500k captions would be 5e10 scores; here the same at a small scale."""
    sizes = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        sizes.append(len(a) * len(b))
        return similarity(a, b)

    monkeypatch.setattr(ranking, "similarity", counted)
    images, texts, owner, text = draw(4)
    limit = 16 * 100
    count_ranks(images, texts, owner, text, block_bytes=limit)
    assert max(sizes) * 16 <= limit
    assert sum(sizes) == N * len(owner)
    sizes.clear()
    top_k(images, texts, text, 5, block_bytes=limit)
    assert max(sizes) * 16 <= limit
    assert ranking._side(ranking.BLOCK_BYTES) ** 2 * 16 <= 64 << 20


def test_top_k_equals_a_sort_of_everything() -> None:
    images, texts, _, text = draw(5)
    scores = similarity(images, texts)[:, text]
    value, index = scores.sort(dim=1, descending=True)
    for limit in (16, 16 * 49, 1 << 20):
        at, best = top_k(images, texts, text, 5, block_bytes=limit)
        assert torch.equal(at, index[:, :5])
        assert torch.equal(best, value[:, :5])
    assert top_k(images[:2], images, torch.arange(2), 5)[0].shape == (2, 2)


# The evaluator


def whole(source: Pairs, twin: Twin) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Similarities (N, M), owners (M,), texts, by the twin's own vectors."""
    rows = [i for i in range(len(source)) if i not in source.bad]
    words = [text for i in rows for text in source.texts[i]]
    owner = np.array([n for n, i in enumerate(rows) for _ in source.texts[i]])
    images = normalize(torch.stack([twin.image_vector(i) for i in rows]), dim=1)
    scores = images.double() @ twin.text_features(words).double().T
    return scores.float().numpy(), owner, words


@pytest.mark.parametrize("duplicates", [False, True])
def test_metrics_follow_the_protocol(duplicates: bool, caplog: pytest.LogCaptureFixture) -> None:
    source = Pairs(bad=(3, 11), duplicates=duplicates)
    found = evaluator("retrieval").run(subject(source), data := eval_data(source))
    scores, owner, words = whole(source, Twin(source))
    i2t = np.array([
        1 + (row[owner != n] >= row[owner == n].max()).sum() for n, row in enumerate(scores)
    ])  # fmt: skip
    t2i = np.array([(c >= c[owner[m]]).sum() for m, c in enumerate(scores.T)])
    for way, ranks in (("i2t", i2t), ("t2i", t2i)):
        for k in (1, 5, 10):
            assert found.metrics[f"{way}-r{k}"] == (ranks <= k).mean()
        assert found.metrics[f"{way}-median-rank"] == np.median(ranks)
    often = np.mean([words.count(word) > 1 for word in words])
    assert found.metrics["duplicate-captions"] == pytest.approx(often)
    by_text = found.metrics["i2t-r1-by-text"], found.metrics["t2i-r1-by-text"]
    assert by_text[0] >= found.metrics["i2t-r1"]
    assert by_text[1] >= found.metrics["t2i-r1"]
    if duplicates:
        nearest = scores.argmax(1)
        right = [words[m] in source.texts[i] for m, i in zip(nearest, read_ids(source))]
        assert by_text[0] == np.mean(right)
        assert by_text[0] > found.metrics["i2t-r1"]
    assert found.num_samples == 38
    assert found.lists == {"captions": [len(words)]}
    assert data.num_bad == 2
    assert "pair 3" in caplog.text
    assert "empty caption" in caplog.text


def read_ids(source: Pairs) -> list[int]:
    return [i for i in range(len(source)) if i not in source.bad]


@pytest.mark.parametrize("k", [1, 6, 1000])
def test_reranking_orders_the_candidates_by_their_pair_scores(k: int) -> None:
    source = Pairs(24, most=3)
    twin = Twin(source)
    found = evaluator("retrieval").run(Subject("twin", (twin,)), eval_data(source, rerank=k))
    scores, owner, words = whole(source, twin)
    pair = np.array([[twin.pair(i, word) for word in words] for i in range(len(source))])
    i2t, t2i = [], []
    for n, row in enumerate(scores):
        near = np.argsort(-row)[:k]
        own = near[owner[near] == n]
        rank = 1 + (row[owner != n] >= row[owner == n].max()).sum()
        best = max(pair[n, own], default=None)
        others = pair[n, near[owner[near] != n]]
        i2t.append(max(rank, len(near) + 1) if best is None else 1 + (others >= best).sum())
    for m, column in enumerate(scores.T):
        near = np.argsort(-column)[:k]
        rank, own = (column >= column[owner[m]]).sum(), pair[owner[m], m]
        inside = owner[m] in near
        t2i.append((pair[near, m] >= own).sum() if inside else max(rank, len(near) + 1))
    for way, ranks in (("i2t", i2t), ("t2i", t2i)):
        for at in (1, 5, 10):
            assert found.metrics[f"reranked-{way}-r{at}"] == (np.array(ranks) <= at).mean()
        assert found.metrics[f"reranked-{way}-median-rank"] == np.median(ranks)


def test_reranking_that_cannot_be_done_says_so(caplog: pytest.LogCaptureFixture) -> None:
    source = Pairs(8)
    twin = subject(source)
    twin.has = lambda kind: kind.__name__ != "PairScorer"  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO, "vlx"):
        found = evaluator("retrieval").run(twin, eval_data(source, rerank=5))
    assert not [name for name in found.metrics if name.startswith("reranked")]
    assert "not re-ranked: twin does not score pairs" in caplog.text


def test_everything_is_encoded_once() -> None:
    source = Pairs(24)
    twin = Twin(source)
    one = Subject("twin", (twin,))
    data = eval_data(source)
    evaluator("retrieval").run(one, data)
    distinct = len({text for texts in source.texts for text in texts})
    assert (twin.num_images, twin.num_texts) == (24, distinct)
    evaluator("retrieval").run(one, data)
    assert (twin.num_images, twin.num_texts) == (24, distinct)


def test_pictures_frame_what_is_right() -> None:
    source = Pairs(30)
    found = evaluator("retrieval").run(subject(source, noise=0.0), eval_data(source))
    texts, images = found.pictures.values()
    assert texts.size == (6 + 102 + 466, 22 + 6 * 102 + 6)
    assert images.size == (6 + 226 + 5 * 108, 22 + 6 * 108 + 6)
    green = (0, 150, 60)
    assert texts.getpixel((6 + 102, 22)) == green  # without noise the best caption is its own
    assert np.array(images)[:, :, 0].min() < 100


def test_a_source_without_captions_is_refused() -> None:
    source = Pairs(5, bad=range(5))
    data = eval_data(source)
    with pytest.raises(DataError, match="5 of 5 samples are unreadable"):
        read_corpus(subject(source), data)
