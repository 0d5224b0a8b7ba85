"""What each budget of one model costs and reaches."""

from __future__ import annotations

from functools import partial

import torch

from vlx.core.capability import Budgets
from vlx.data.pipeline import EvalPipeline
from vlx.evals.base import EvalData, Evaluation, Subject
from vlx.evals.classification import count_hits
from vlx.evals.tokens import Forward, alternate, gmacs


class BudgetCurve:
    """Protocol budgets@1: top-1 over the test split, GMACs of one image and images/s, by budget.

    GMACs and images/s as protocol tokens@1 has them, all budgets measured in turn.
    """

    name = "budgets"
    version = 1
    requires = (Budgets,)
    needs_labels = True
    needs_captions = False

    @torch.no_grad()
    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        model = subject.get(Budgets)
        budgets, side, device = model.budgets(), model.image_size, data.device
        pipeline: EvalPipeline = data.pipeline("test")
        info = data.source("test").info
        found = Evaluation(split=f"{info.name}/{info.split}")
        for budget, forward in budgets.items():
            hits = count_hits(Forward(forward), pipeline, info.num_classes)
            found.metrics[f"top1/{budget}"] = float(hits[:, 0].sum() / hits[:, 2].sum())
            found.num_samples = int(hits[:, 2].sum())
            found.metrics[f"gmacs/{budget}"] = gmacs(forward, side, device)
            found.units[f"gmacs/{budget}"] = "GMACs of one image"
        for size in data.cfg.speed_batches:
            images = torch.rand(size, 3, side, side, device=device)
            seconds = alternate([partial(f, images) for f in budgets.values()], device)
            for budget, taken in zip(budgets, seconds):
                key = f"images-per-s-batch{size}/{budget}"
                found.metrics[key], found.units[key] = size / taken, "images/s"
        return found
