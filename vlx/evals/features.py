"""Features of a whole split, gathered over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    # A process whose whole share is unreadable has nothing to add, and says so.
    found = [tuple(torch.cat(part) for part in (rows, labels, ids))] if rows else []
    if pipeline.world > 1:
        mine = [tuple(part.cpu() for part in parts) for parts in found]
        gathered: list[Any] = [None] * pipeline.world
        dist.all_gather_object(gathered, mine)
        found = [parts for own in gathered for parts in own]
    if not found:
        raise DataError(f"no sample of {pipeline.source.info.name} could be read")
    features, label, sample_id = (
        torch.cat(column).to(pipeline.device) for column in zip(*found, strict=True)
    )
    # First occurrence of each id, in order: processes pad their shares with repeats.
    sample_id, first = _first_occurrences(sample_id)
    return Features(features[first], label[first], sample_id)


def _first_occurrences(ids: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort(ids, stable=True)
    ordered = ids[order]
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new], order[new]
