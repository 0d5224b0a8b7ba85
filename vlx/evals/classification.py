"""Accuracy of a classifier's own head."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlx.core.capability import ClassLogits
from vlx.core.errors import DataError
from vlx.data.pipeline import EvalPipeline
from vlx.evals.base import EvalData, Evaluation, Subject


class Classification:
    """Protocol classification@1: the deterministic central view, top-1, top-5 and the mean
    cross-entropy over all readable samples, and the mean over classes of each class's top-1."""

    name = "classification"
    version = 1
    requires = (ClassLogits,)
    needs_labels = True
    needs_captions = False

    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        info = data.source("test").info
        hits = count_hits(subject.get(ClassLogits), data.pipeline("test"), info.num_classes)
        metrics = {"top1": hits[:, 0].sum() / hits[:, 2].sum()}
        if info.num_classes > 5:
            metrics["top5"] = hits[:, 1].sum() / hits[:, 2].sum()
        present = hits[hits[:, 2] > 0]
        metrics["mean-per-class"] = (present[:, 0] / present[:, 2]).mean()
        metrics["loss"] = hits[:, 3].sum() / hits[:, 2].sum()
        return Evaluation(
            metrics={name: float(value) for name, value in metrics.items()},
            units={"loss": "nats"},
            split=f"{info.name}/{info.split}",
            num_samples=int(hits[:, 2].sum()),
        )


def judged(logits: Tensor, labels: Tensor) -> Tensor:
    """`(B, 4)` float32 of logits (B, C): top-1 hit, top-5 hit, 1, cross-entropy."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
    loss = cross_entropy(logits.float(), labels, reduction="none")
    return torch.stack([ranked[:, 0], ranked.any(1), torch.ones_like(loss), loss], 1)


@torch.no_grad()
def count_hits(subject: ClassLogits, pipeline: EvalPipeline, num_classes: int) -> Tensor:
    """`(C, 4)` float64 by true class: top-1 hits, top-5 hits, samples, cross-entropy; summed over
    samples and processes."""
    hits = torch.zeros(num_classes, 4, dtype=torch.float64)
    for batch in pipeline.batches():
        if len(batch["sample_id"]) == 0:
            continue
        labels = batch["label"]
        found = judged(subject.class_logits(batch["image"]), labels)
        own = pipeline.own(batch["sample_id"])
        hits.index_add_(0, labels[own].cpu(), found[own].double().cpu())
    if pipeline.world > 1:
        hits = hits.to(pipeline.device)
        dist.all_reduce(hits)
        hits = hits.cpu()
    if not hits[:, 2].sum():
        raise DataError(f"no sample of {pipeline.source.info.name} could be read")
    return hits
