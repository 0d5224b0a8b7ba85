"""Whether a classifier says the same of a shifted image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vlx.core.capability import ClassLogits
from vlx.core.errors import DataError
from vlx.data.pipeline import EvalPipeline
from vlx.evals.base import EvalData, Evaluation, Subject

LARGEST_SHIFT = 15
_COLUMNS = ("top1", "shifted/top1", "consistency", "worst/top1")


class ShiftConsistency:
    """Protocol shifts@1 (Ding et al. 2023, official evaluation): the deterministic central view and
    two circular shifts of it, drawn for each batch by its number, uniform in 0..14 pixels an axis.
    `top1` is of the image as it is, `shifted/top1` of the first shift, `consistency` the share of
    images whose two shifts get the same class, `worst/top1` that of images which are right in all
    three."""

    name = "shifts"
    version = 1
    requires = (ClassLogits,)
    needs_labels = True
    needs_captions = False

    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        pipeline, info = data.pipeline("test"), data.source("test").info
        counts = count_consistent(subject.get(ClassLogits), pipeline)
        if not counts[-1]:
            raise DataError(f"no sample of {info.name} could be read")
        metrics = {name: float(count / counts[-1]) for name, count in zip(_COLUMNS, counts)}
        return Evaluation(metrics, split=f"{info.name}/{info.split}", num_samples=int(counts[-1]))


@torch.no_grad()
def count_consistent(model: ClassLogits, pipeline: EvalPipeline) -> Tensor:
    """`(5,)` float64: what the columns count, and samples; summed over processes."""
    counts = torch.zeros(5, dtype=torch.float64)
    for number, batch in enumerate(pipeline.batches()):
        if len(batch["sample_id"]) == 0:
            continue
        images, labels = batch["image"], batch["label"]
        copies = [images, *shifted(images, number * pipeline.world + pipeline.rank)]
        rows = consistent([model.class_logits(copy).argmax(1) for copy in copies], labels)
        own = pipeline.own(batch["sample_id"])
        counts[:4] += rows[own].sum(0).double().cpu()
        counts[4] += int(own.sum())
    if pipeline.world > 1:
        counts = counts.to(pipeline.device)
        dist.all_reduce(counts)
        counts = counts.cpu()
    return counts


def consistent(found: Sequence[Tensor], labels: Tensor) -> Tensor:
    """`(B, 4)` bool: what the columns count, of the classes (B,) of an image and its two shifts."""
    plain, first, second = (classes == labels for classes in found)
    return torch.stack([plain, first, found[1] == found[2], plain & first & second], 1)


def shifted(images: Tensor, batch_number: int) -> list[Tensor]:
    """Two circular shifts of images (B, C, H, W), each the same for all of them."""
    generator = torch.Generator("cpu").manual_seed(batch_number)
    shifts = torch.randint(0, LARGEST_SHIFT, (2, 2), generator=generator).tolist()
    return [images.roll((down, right), (2, 3)) for down, right in shifts]
