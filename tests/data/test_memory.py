"""A worker's memory stays flat over an epoch (FIELD-NOTES section 4, test 15)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.make import config
from vlx.core.fields import LABEL, Needs, ViewSpec
from vlx.data.cache import Index, pack_names, unpack_name
from vlx.data.config import Resident
from vlx.data.pipeline import Share, TrainPipeline
from vlx.data.source import Sample, SourceInfo
from vlx.ops.augment import HorizontalFlip

ENTRIES = 1_000_000
BATCH = 4000
STEPS = ENTRIES // BATCH // 2  # half an epoch, its places spread over the whole index
PIXEL = np.zeros((1, 1, 3), np.uint8)


def resident_kib() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


class Million:
    """An index as `folder` keeps it. A label is the memory of the process that read the sample."""

    def __init__(self) -> None:
        names = [b"class%03d/%07d.jpg" % (i % 1000, i) for i in range(ENTRIES)]
        self.index = Index(pack_names(names), {})
        self.info = SourceInfo("million", "train", ENTRIES, ("image", "label"))

    def __len__(self) -> int:
        return ENTRIES

    def read(self, index: int) -> Sample:
        assert self.describe(index).endswith(f"/{index:07d}.jpg")
        return {"image": PIXEL, "label": resident_kib() if index % 50 == 0 else 0}

    def describe(self, index: int) -> str:
        return unpack_name(self.index, index)

    def labels(self) -> np.ndarray | None:
        return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_worker_reads_a_million_entry_index_in_flat_memory() -> None:
    source = Million()
    assert sum(array.nbytes for array in source.index.arrays.values()) < 32 * ENTRIES
    pipeline = TrainPipeline(
        source,
        Needs(views=(ViewSpec("image", ops=(HorizontalFlip(),)),), fields=(LABEL,)),
        cfg=config(workers=1, resident=Resident.never),
        image_size=1,
        seed=0,
        share=Share(BATCH),
        device=torch.device("cpu"),
    )
    seen = [int(batch["label"].max()) for batch in pipeline.batches(0, STEPS)]
    early, late = max(seen[: STEPS // 10]), max(seen[-STEPS // 10 :])
    assert early > 0
    assert late <= 1.05 * early
