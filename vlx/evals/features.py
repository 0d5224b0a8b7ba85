"""Features of a whole split, gathered over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vlx.core.errors import DataError
from vlx.data.pipeline import EvalPipeline

T = TypeVar("T")


@dataclass(frozen=True)
class Features:
    """Rows in the order of the source; unreadable samples are absent."""

    features: Tensor
    """(N, D) float32."""
    labels: Tensor
    """(N,) int64; -1 where the source has no labels."""
    sample_id: Tensor
    """(N,) int64."""


@torch.no_grad()
def extract(encode: Callable[[Tensor], Tensor], pipeline: EvalPipeline) -> Features:
    """Features and labels of every readable sample, once each, on every process.

    encode: images (B, 3, H, W) to (B, D), e.g. `ImageFeatures.image_features`.
    """
    rows, labels, ids = [], [], []
    labelled = "label" in pipeline.source.info.fields
    for batch in pipeline.batches():
        if len(batch["sample_id"]) == 0:
            continue
        rows.append(encode(batch["image"]).float())
        labels.append(batch["label"] if labelled else torch.full_like(batch["sample_id"], -1))
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


@torch.no_grad()
def in_shares(
    batches: Sequence[T],
    encode: Callable[[T], Tensor],
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Tensor:
    """Float32 rows of `encode(batch)` of all batches in order, on every process.

    Each process encodes its share. All call `encode` equally often, which sharded weights need.
    """
    rounds = -(-len(batches) // world)
    mine = [encode(batches[min(r * world + rank, len(batches) - 1)]).float() for r in range(rounds)]
    if world == 1:
        return torch.cat(mine)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, [rows.cpu() for rows in mine])
    ordered = [gathered[index % world][index // world] for index in range(len(batches))]
    return torch.cat(ordered).to(device)
