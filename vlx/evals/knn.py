"""k-nearest-neighbour accuracy of frozen features (Wu et al., 2018; the DINO protocol)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlx.core.capability import ImageFeatures
from vlx.evals.base import EvalData, Evaluation, Subject

NEIGHBOURS = 20
TEMPERATURE = 0.07
_BLOCK, _COLUMNS = 1024, 16384  # rows of the test and of the training split at a time: 64 MiB


def knn_predict(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, k: int = NEIGHBOURS
) -> Tensor:
    """Class of each row of `test (M, D)`: votes of the k most similar rows of `train (N, D)` by
    cosine, each weighted exp(similarity / 0.07). Returns (M,) int64."""
    predictions = []
    for block in normalize(test, dim=1).split(_BLOCK):
        similarity, index = _nearest(block, train, min(k, len(train)))  # (m, k)
        votes = torch.zeros(len(block), num_classes, device=block.device)
        votes.scatter_add_(1, labels[index], (similarity / TEMPERATURE).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def _nearest(queries: Tensor, train: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(m, k) cosines, best first, and rows of the k most similar of `train (N, D)`.

    queries: (m, D) of length one. Looks at `_COLUMNS` rows at a time: 1.28 M rows at once would be
    5 GB of similarities, and a copy of them at length one as much as the features.
    """
    best = queries.new_zeros(len(queries), 0)
    at = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(train), _COLUMNS):
        found = queries @ normalize(train[start : start + _COLUMNS], dim=1).T
        value, place = found.topk(min(k, found.shape[1]), dim=1)
        best, at = torch.cat([best, value], 1), torch.cat([at, place + start], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        at = at.gather(1, order)
    return best, at


class Knn:
    """Protocol knn@1: mean-pooled features, cosine, k = 20, temperature 0.07, no augmentation."""

    name = "knn"
    version = 1
    requires = (ImageFeatures,)
    needs_labels = True
    needs_captions = False

    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        train, test = data.features(subject, "train"), data.features(subject, "test")
        info = data.source("test").info
        predicted = knn_predict(train.features, train.labels, test.features, info.num_classes)
        accuracy = (predicted == test.labels).float().mean().item()
        return Evaluation(
            metrics={"top1": accuracy},
            split=f"{info.name}/{info.split}",
            num_samples=len(test.labels),
        )
