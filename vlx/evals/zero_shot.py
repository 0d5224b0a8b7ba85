"""Zero-shot classification: images against the names of the classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from vlx.core.capability import DualEncoder
from vlx.data.cache import digest
from vlx.evals.base import EvalData, Evaluation, Subject
from vlx.evals.class_texts import class_texts, class_words
from vlx.evals.features import Features
from vlx.evals.pictures import GREEN, GREY, RED, bar_panel, grid, to_picture
from vlx.evals.ranking import BLOCK_BYTES, similarity
from vlx.ops.contrastive import mean_of_templates

log = logging.getLogger("vlx")
_NAMED = 5
_ROWS = 8
_BARS = 5
_PANEL = 380


class ZeroShot:
    """Protocol zero-shot@2: the deterministic central view; all readable samples of the test split.

    A class is the mean of its texts' embeddings, each of unit length, brought to unit length
    again (Radford et al. 2021, section 3.1.4). Its texts are its name in every template of
    `eval.templates` (or `eval.template_list`): underscores of the name become spaces, ImageNet's
    WordNet ids become open_clip's names. An image belongs to the class of the highest cosine
    similarity, summed in float64 and rounded to float32. top1 and top5 (of more than 5 classes)
    are shares of samples, a tie counting as a miss; mean-per-class is the mean of top1 over the
    classes that have samples. Classes of equal texts are one class: of open_clip's ImageNet names,
    `missile` (657, 744) and `sunglasses` (836, 837) stand twice. Where there are such classes,
    `merged-classes` lists each behind the first of its texts, and `merged` counts them.
    """

    name = "zero-shot"
    version = 2
    requires = (DualEncoder,)
    needs_labels = True
    needs_captions = False

    @torch.no_grad()
    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        info = data.source("test").info
        names = class_words(info.class_names)
        merged, names, of_class = one_of_equals(names, data)
        classes = classifier(subject, data, names)  # (C, E)
        found = data.joint_features(subject, "test")
        found = replace(found, labels=of_class.to(found.labels.device)[found.labels])
        place, guess = classify(found.features, classes, found.labels)
        hits = torch.bincount(found.labels[place == 1], minlength=len(names))
        samples = torch.bincount(found.labels, minlength=len(names))
        metrics = {"top1": (place == 1).double().mean()}
        if len(names) > 5:
            metrics["top5"] = (place <= 5).double().mean()
        seen = samples > 0
        metrics["mean-per-class"] = (hits[seen].double() / samples[seen]).mean()
        equal = {"merged-classes": list(chain(*merged))} if merged else {}
        if merged:
            metrics["merged"] = torch.tensor(float(len(merged)))
            words = [
                f"{names[of_class[second]]} ({first} and {second})" for first, second in merged
            ]
            log.warning(f"zero-shot: classes of equal texts count as one: {', '.join(words)}")
        pairs = confusions(found.labels, guess, len(names))
        if pairs:
            log.info(f"zero-shot, {subject.weights} weights: {_in_words(pairs, names, samples)}")
        return Evaluation(
            metrics={name: float(value) for name, value in metrics.items()},
            units={"merged": "classes"},
            lists={"hits-by-class": hits.tolist(), "samples-by-class": samples.tolist(), **equal},
            split=f"{info.name}/{info.split}",
            num_samples=len(found.labels),
            pictures=_pictures(data, found, classes, names, guess, pairs),
        )


def one_of_equals(
    names: Sequence[str], data: EvalData
) -> tuple[list[tuple[int, int]], list[str], Tensor]:
    """Classes whose texts are equal, made one.

    Returns (first class, class of the same texts) for each that is merged; the names that are
    left; and (C,) int64: the place among them of each class.
    """
    texts = [tuple(own) for own in class_texts(names, data.cfg)]
    first: dict[tuple[str, ...], int] = {}
    for number, own in enumerate(texts):
        first.setdefault(own, number)
    place = {number: i for i, number in enumerate(first.values())}
    merged = [(first[own], i) for i, own in enumerate(texts) if first[own] != i]
    return merged, [names[n] for n in place], torch.tensor([place[first[own]] for own in texts])


def classifier(subject: Subject, data: EvalData, names: Sequence[str]) -> Tensor:
    """(C, E): one vector of unit length for each class."""
    texts = class_texts(names, data.cfg)
    each = len(texts[0])
    size = max(1, data.cfg.batch_size // each)
    batches = [list(chain(*texts[start : start + size])) for start in range(0, len(texts), size)]
    encode = subject.get(DualEncoder).text_features

    def means(batch: Sequence[str]) -> Tensor:
        rows = normalize(encode(batch).float(), dim=1)
        return mean_of_templates(rows.unflatten(0, (-1, each)))

    found = subject.once(
        "classes",
        (str(each), digest(*chain(*texts))),
        lambda: {"classes": data.in_shares(batches, means)},
        rows=len(names),
        device=data.device,
    )
    return found["classes"]


def classify(features: Tensor, classes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Place of the true class among all, 1 being best, ties against it; and the best class: (N,).

    features: (N, E); classes: (C, E); labels: (N,).
    """
    places, guesses = [], []
    rows = max(1, BLOCK_BYTES // (16 * len(classes)))
    for block, true in zip(features.split(rows), labels.split(rows)):
        scores = similarity(block, classes)
        own = scores.gather(1, true[:, None])
        places.append((~(scores < own)).sum(1))
        guesses.append(scores.argmax(1))
    return torch.cat(places), torch.cat(guesses)


def confusions(labels: Tensor, guess: Tensor, count: int) -> list[tuple[int, int, int]]:
    """(true class, guessed class, times), most frequent first."""
    wrong = labels != guess
    pair, times = torch.unique(labels[wrong] * count + guess[wrong], return_counts=True)
    order = torch.argsort(times, descending=True, stable=True)
    return [
        (value // count, value % count, often)
        for value, often in zip(pair[order].tolist(), times[order].tolist())
    ]


def _in_words(pairs: Sequence[tuple[int, int, int]], names: Sequence[str], samples: Tensor) -> str:
    worst = [
        f"{names[true]} as {names[guess]} {times} of {int(samples[true])}"
        for true, guess, times in pairs[:_NAMED]
    ]
    return f"most often confused: {', '.join(worst)}"


def _pictures(
    data: EvalData,
    found: Features,
    classes: Tensor,
    names: Sequence[str],
    guess: Tensor,
    pairs: Sequence[tuple[int, int, int]],
) -> dict[str, Image.Image]:
    """Of each of the most frequent confusions the image that is furthest on the wrong side."""
    chosen, panels = [], []
    for true, wrong, times in pairs[:_ROWS]:
        rows = ((found.labels == true) & (guess == wrong)).nonzero()[:, 0]
        scores = similarity(found.features[rows], classes)
        worst = int((scores[:, wrong] - scores[:, true]).argmax())
        chosen.append(int(found.sample_id[rows[worst]]))
        shown = scores[worst].topk(min(_BARS, len(names))).indices.tolist()
        if true not in shown:
            shown[-1] = true
        colours = {true: GREEN, wrong: RED}
        bars = [(names[c], float(scores[worst, c]), colours.get(c, GREY)) for c in shown]
        title = f"{names[true]}, taken for {names[wrong]} ({times}x)"
        panels.append((title, bars))
    if not chosen:
        return {}
    images = [to_picture(image) for image in data.images("test", chosen)]
    rows = [
        [image, bar_panel(title, bars, width=_PANEL, height=image.height)]
        for image, (title, bars) in zip(images, panels)
    ]
    titles = [(0, "image"), (1, "similarity: true class green, guess red")]
    return {"confusions": grid(rows, titles)}
