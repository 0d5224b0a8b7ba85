"""CIFAR-10 resident on the device against torchvision's CIFAR10 and a DataLoader of two workers.

Both crop 32 of 40 pixels, flip, scale to 0..1 and normalise, in batches of 512 on the CPU. vlx
runs in two threads, its peer in two processes: measure on a quiet machine, where threads that wait
for a busy core do not stall the batch.
`python -m benchmarks.data [FOLDER]`; the folder holds train.parquet, ../shared/data/cifar10.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.measure import Row, alternate
from vlx.core.fields import LABEL, Needs, ViewSpec
from vlx.data.config import DataConfig, Resident
from vlx.data.open import open_source
from vlx.data.pipeline import Share, TrainPipeline
from vlx.ops.augment import HorizontalFlip, RandomCrop

FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "cifar10"
BATCH = 512
ROUNDS = 5
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def vlx_batches(pipeline: TrainPipeline) -> Iterator[Tensor]:
    """Epoch after epoch, normalised as an encoder does it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for batch in pipeline.batches(0, 1_000_000_000):
        yield (batch["image"] - mean).div_(std)


def build_pipeline(folder: Path) -> TrainPipeline:
    cfg = DataConfig(source="parquet", path=str(folder), resident=Resident.always)
    ops = (RandomCrop(padding=4), HorizontalFlip(0.5))
    return TrainPipeline(
        open_source(cfg, "train"),
        Needs(views=(ViewSpec("image", ops=ops),), fields=(LABEL,)),
        cfg=cfg,
        image_size=32,
        seed=0,
        share=Share(BATCH),
        device=torch.device("cpu"),
    )


def build_loader(images: Tensor, labels: Tensor) -> DataLoader:
    """torchvision's own class, with our copy of the data in place of its download."""
    data = datasets.CIFAR10.__new__(datasets.CIFAR10)
    data.data = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    data.targets = labels.tolist()
    data.target_transform = None
    data.transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(
        data, batch_size=BATCH, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True
    )


def main(folder: Path = FOLDER) -> list[Row]:
    """Medians over alternating epochs; prints images/s of both and their ratio."""
    torch.set_num_threads(2)
    pipeline = build_pipeline(folder)
    assert pipeline.residents is not None
    assert pipeline.residents.images is not None
    assert pipeline.residents.labels is not None
    loader = build_loader(pipeline.residents.images, pipeline.residents.labels)
    steps = pipeline.steps_per_epoch
    ours = vlx_batches(pipeline)

    def our_epoch() -> None:
        for _ in range(steps):
            next(ours)

    def their_epoch() -> None:
        for _ in loader:
            pass

    our_time, their_time = alternate(our_epoch, their_epoch, rounds=ROUNDS)
    images = steps * BATCH
    row = Row(
        name="CIFAR-10 resident: crop, flip, normalise",
        ours=images / our_time,
        peer=images / their_time,
        unit="images/s",
        peer_name="torchvision + DataLoader, 2 workers",
        target=">= 10",
    )
    print(f"vlx {row.ours:,.0f} images/s, torchvision {row.peer:,.0f}: {row.ratio:.1f} x")
    return [row]


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:]))
