"""Features of a whole split, gathered over processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vlx.core.capability import ImageFeatures
from vlx.core.errors import DataError
from vlx.data.pipeline import EvalPipeline


@dataclass(frozen=True)
class Features:
    """Rows in the order of the source; unreadable samples are absent."""

    features: Tensor
    """(N, D) float32."""
    labels: Tensor
    """(N,) int64."""
    sample_id: Tensor
    """(N,) int64."""


@torch.no_grad()
def extract(subject: ImageFeatures, pipeline: EvalPipeline) -> Features:
    """Features and labels of every readable sample, once each, on every process."""
    rows, labels, ids = [], [], []
    for batch in pipeline.batches():
        if len(batch["sample_id"]) == 0:
            continue
        if "label" not in batch:
            raise DataError(
                f"{pipeline.source.info.name} has no labels; this evaluation needs them"
            )
        rows.append(subject.image_features(batch["image"]).float())
        labels.append(batch["label"])
        ids.append(batch["sample_id"])
    parts = (torch.cat(rows), torch.cat(labels), torch.cat(ids))
    if pipeline.world > 1:
        gathered: list = [None] * pipeline.world
        dist.all_gather_object(gathered, tuple(part.cpu() for part in parts))
        parts = tuple(torch.cat([g[i] for g in gathered]) for i in range(3))
        parts = tuple(part.to(pipeline.device) for part in parts)
    features, label, sample_id = parts
    # First occurrence of each id, in order: processes pad their shares with repeats.
    sample_id, first = _first_occurrences(sample_id)
    return Features(features[first], label[first], sample_id)


def _first_occurrences(ids: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort(ids, stable=True)
    ordered = ids[order]
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new], order[new]
