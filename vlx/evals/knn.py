"""k-nearest-neighbour accuracy of frozen features (Wu et al., 2018; the DINO protocol)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlx.core.capability import ImageFeatures
from vlx.evals.base import EvalData, Evaluation, Subject

NEIGHBOURS = 20
TEMPERATURE = 0.07
_BLOCK = 1024


def knn_predict(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, k: int = NEIGHBOURS
) -> Tensor:
    """Class of each row of `test (M, D)`: votes of the k most similar rows of `train (N, D)` by
    cosine, each weighted exp(similarity / 0.07). Returns (M,) int64."""
    train, test = normalize(train, dim=1), normalize(test, dim=1)
    k = min(k, len(train))
    predictions = []
    for block in test.split(_BLOCK):
        similarity, index = (block @ train.T).topk(k, dim=1)  # (m, k)
        votes = torch.zeros(len(block), num_classes, device=block.device)
        votes.scatter_add_(1, labels[index], (similarity / TEMPERATURE).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


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
