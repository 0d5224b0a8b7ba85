"""The host's half: read, decode to uint8, collate. Nothing is augmented here."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlx.core.errors import DataError
from vlx.core.text import Tokenizer
from vlx.data.config import DataConfig
from vlx.data.decode import decode_image
from vlx.data.order import replacement
from vlx.data.source import Sample, Source
from vlx.data.text import EncodedText, drawn_captions, encode

_MAX_REPLACEMENTS = 16
_SHOWN = 5


@dataclass(frozen=True)
class Draw:
    """Samples to read together. `epoch` None means evaluation: unreadable ones are left out."""

    indices: np.ndarray
    epoch: int | None


@dataclass
class HostBatch:
    """Collated samples on the host."""

    images: Tensor
    """(B, 3, H, W) uint8, each image in the top left corner of the largest."""
    sizes: Tensor
    """(B, 2) int64 true height and width."""
    sample_id: Tensor
    """(B,) int64."""
    labels: Tensor | None
    bad: list[tuple[int, str, str]]
    """(index, name, reason) of the samples that could not be read."""
    epoch: int | None = None
    text: EncodedText | None = None
    """One caption of every sample, as ids; only with a tokenizer."""


@dataclass
class BadSamples:
    """Counts unreadable samples over a run; each counts once."""

    num_samples: int
    limit: float
    reasons: dict[int, str] = field(default_factory=dict)

    def add(self, bad: Iterable[tuple[int, str, str]]) -> list[str]:
        """Lines to log for newly found ones; raises `DataError` past the limit."""
        lines = []
        for index, name, reason in bad:
            if index not in self.reasons:
                self.reasons[index] = f"{name}: {reason}"
                lines.append(f"skipped unreadable sample {index} ({name}): {reason}")
        count = len(self.reasons)
        if count > self.limit * self.num_samples:
            first = "; ".join(list(self.reasons.values())[:_SHOWN])
            raise DataError(
                f"{count} of {self.num_samples} samples are unreadable, over data.corrupt_limit="
                f"{self.limit}. First: {first}"
            )
        return lines


class HostDataset(Dataset[HostBatch]):
    """Reads a `Draw` as one collated batch; works in a worker process."""

    def __init__(
        self, source: Source, cfg: DataConfig, seed: int, tokenizer: Tokenizer | None = None
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.max_pixels, self.max_side = cfg.max_pixels, cfg.max_side
        self.seed = seed

    def __getitem__(self, draw: Draw) -> HostBatch:
        images, samples, ids = [], [], []
        bad: list[tuple[int, str, str]] = []
        for index in draw.indices.tolist():
            found = self._read(index, draw.epoch, bad)
            if found is not None:
                actual, image, sample = found
                ids.append(actual)
                images.append(image)
                samples.append(sample)
        labels = [sample.get("label") for sample in samples]
        batch = collate(images, labels, ids, bad, draw.epoch)
        if samples and self.tokenizer is not None:
            assert draw.epoch is not None
            captions = [sample["caption"] for sample in samples]
            counts = torch.tensor([len(own) for own in captions])
            drawn = drawn_captions(counts, batch.sample_id, self.seed, draw.epoch).tolist()
            batch.text = encode(self.tokenizer, [own[n] for own, n in zip(captions, drawn)])
        return batch

    def _read(
        self, index: int, epoch: int | None, bad: list[tuple[int, str, str]]
    ) -> tuple[int, np.ndarray, Sample] | None:
        """The sample, or in training its stand-in; None for an unreadable one in evaluation."""
        current = index
        for attempt in range(_MAX_REPLACEMENTS):
            try:
                sample = self.source.read(current)
                image = decode_image(sample["image"], self.max_pixels, self.max_side)
                return current, image, sample
            except Exception as error:  # any failure to read one sample is that sample's
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                bad.append((current, self.source.describe(current), reason))
            if epoch is None:
                return None
            current = replacement(index, len(self.source), self.seed, epoch, attempt)
        raise DataError(
            f"{_MAX_REPLACEMENTS} samples in a row are unreadable; last: {bad[-1][1]}: {bad[-1][2]}"
        )


def collate(
    images: Sequence[np.ndarray],
    labels: Sequence[int | None],
    ids: Sequence[int],
    bad: list[tuple[int, str, str]],
    epoch: int | None,
) -> HostBatch:
    """Arrays (H, W, 3) of any sizes as one padded uint8 tensor."""
    sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64).view(-1, 2)
    height, width = (int(side) for side in sizes.amax(0)) if images else (1, 1)
    canvas = torch.zeros(len(images), height, width, 3, dtype=torch.uint8)
    for row, image in enumerate(images):
        canvas[row, : image.shape[0], : image.shape[1]] = torch.from_numpy(np.array(image))
    known = [label for label in labels if label is not None]
    return HostBatch(
        images=canvas.permute(0, 3, 1, 2),
        sizes=sizes,
        sample_id=torch.tensor(ids, dtype=torch.int64),
        labels=torch.tensor(known, dtype=torch.int64) if len(known) == len(labels) else None,
        bad=bad,
        epoch=epoch,
    )


class _Draws(torch.utils.data.Sampler[Draw]):
    def __init__(self, draws: Iterable[Draw]) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[Draw]:
        return iter(self.draws)


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C and batch systems signal the whole process group. The run answers by saving, which
    it could not do if its workers died first; they end when it does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def read_batches(
    source: Source,
    cfg: DataConfig,
    seed: int,
    draws: Iterable[Draw],
    *,
    pin: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Iterator[HostBatch]:
    """Batches in the order of `draws`, read by `cfg.workers` processes."""
    dataset = HostDataset(source, cfg, seed, tokenizer)
    if cfg.workers == 0:
        for draw in draws:
            yield dataset[draw]
        return
    loader = DataLoader(
        dataset,
        sampler=_Draws(draws),
        batch_size=None,
        num_workers=cfg.workers,
        pin_memory=pin,
        timeout=180,
        prefetch_factor=2,
        # Its own generator: else the loader draws from torch's global one, and what a run draws
        # later would depend on the number of workers.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_signals_to_parent,
    )
    yield from loader
