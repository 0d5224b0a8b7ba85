"""Linear probe of frozen features by multinomial logistic regression."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlx.core.capability import ImageFeatures
from vlx.evals.base import EvalData, Evaluation, Subject

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
        loss = cross_entropy(features @ weight.T + bias, labels)
        loss = loss + weight.square().sum() / (2 * c * n)
        loss.backward()
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
        logits = (test.features - mean) / std @ weight.T + bias
        accuracy = (logits.argmax(1) == test.labels).float().mean().item()
        return Evaluation(
            metrics={"top1": accuracy},
            split=f"{info.name}/{info.split}",
            num_samples=len(test.labels),
        )
