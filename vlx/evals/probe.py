"""Linear probe of frozen features by multinomial logistic regression."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlx.core.capability import ImageFeatures
from vlx.evals.base import EvalData, Evaluation, Subject
from vlx.evals.ranking import BLOCK_BYTES

C = 1.0
MAX_ITERATIONS = 500


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, c: float = C
) -> tuple[Tensor, Tensor]:
    """Weights (K, D) and biases (K,) that minimise sum of cross-entropies + |W|^2 / (2c).

    scikit-learn's objective, solved by full-batch L-BFGS on the features' own device. The bias is
    not penalised. Starts from zero, so the result is the same every time.
    """
    n, d = features.shape
    weight = torch.zeros(num_classes, d, dtype=features.dtype, device=features.device)
    bias = torch.zeros(num_classes, dtype=features.dtype, device=features.device)
    rows = max(1, BLOCK_BYTES // (num_classes * features.element_size()))
    params = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(
        params,
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = weight.square().sum() / (2 * c * n)
        loss.backward()
        for block, own in zip(features.split(rows), labels.split(rows)):
            # Backward at once: 1.28 M rows of 1000 logits and their gradients would be 10 GB.
            part = cross_entropy(block @ weight.T + bias, own) * (len(own) / n)
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return weight.detach(), bias.detach()


class LinearProbe:
    """Protocol linear-probe@1: mean-pooled features without augmentation, each dimension
    standardised by the training split, logistic regression with C = 1."""

    name = "linear-probe"
    version = 1
    requires = (ImageFeatures,)
    needs_labels = True
    needs_captions = False

    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        train, test = data.features(subject, "train"), data.features(subject, "test")
        info = data.source("test").info
        mean = train.features.mean(0)
        std = train.features.std(0).clamp(min=1e-6)
        weight, bias = fit_logistic((train.features - mean) / std, train.labels, info.num_classes)
        rows = max(1, BLOCK_BYTES // (info.num_classes * weight.element_size()))
        blocks = ((test.features - mean) / std).split(rows)
        guess = torch.cat([(block @ weight.T + bias).argmax(1) for block in blocks])
        accuracy = (guess == test.labels).float().mean().item()
        return Evaluation(
            metrics={"top1": accuracy},
            split=f"{info.name}/{info.split}",
            num_samples=len(test.labels),
        )
