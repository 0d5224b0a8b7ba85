"""All of a source on the device, where it fits: decoded once, indexed there."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vlx.core.errors import DataError
from vlx.core.text import Tokenizer
from vlx.data.config import DataConfig
from vlx.data.host import BadSamples, Draw, HostBatch, read_batches
from vlx.data.order import replacement
from vlx.data.source import Source
from vlx.data.text import EncodedText, drawn_captions, encode, to_device

log = logging.getLogger("vlx")
_CHUNK = 256


class Residents:
    """All images of a source on the device as uint8, indexed there, and all captions as ids."""

    def __init__(
        self,
        source: Source,
        cfg: DataConfig,
        seed: int,
        device: torch.device,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.num_samples = len(source)
        self.bad = BadSamples(self.num_samples, cfg.corrupt_limit)
        self.images: Tensor | None = None
        labels = torch.full((self.num_samples,), -1)
        self.readable = torch.ones(self.num_samples, dtype=torch.bool)
        texts: list[str] = []
        counts = torch.zeros(self.num_samples, dtype=torch.int64)
        for index, batch in _read_all(source, cfg, seed):
            for line in self.bad.add(batch.bad):
                log.warning(line)
            for missing, _, _ in batch.bad:
                self.readable[missing] = False
            if len(batch.sample_id) == 0:
                continue
            if self.images is None:
                shape = (self.num_samples, *batch.images.shape[1:])
                self.images = torch.zeros(shape, dtype=torch.uint8)
            same = batch.images.shape[1:] == self.images.shape[1:]
            side = torch.tensor(self.images.shape[-2:])
            if not same or not bool((batch.sizes == side).all()):
                raise DataError(
                    f"data.resident=always needs images of one size; near sample {index} they "
                    "differ. Use data.resident=never"
                )
            self.images[batch.sample_id] = batch.images
            if batch.labels is not None:
                labels[batch.sample_id] = batch.labels
            for sample in batch.sample_id.tolist() if tokenizer is not None else ():
                captions = source.captions(sample)  # type: ignore[attr-defined]
                counts[sample] = len(captions)
                texts += captions
        if self.images is None:
            raise DataError(f"no sample of {source.info.name} could be read")
        self.images = self.images.to(device)
        self.labels = labels.to(device) if "label" in source.info.fields else None
        self.text: EncodedText | None = None
        if tokenizer is not None:
            found = encode(tokenizer, texts)
            self.text = to_device(found, device)
            self.counts, self.starts = counts.to(device), (counts.cumsum(0) - counts).to(device)

    def resolve(self, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Indices with unreadable samples replaced as the streaming path replaces them."""
        if not self.bad.reasons:
            return indices
        result = indices.copy()
        for row, index in enumerate(indices.tolist()):
            attempt = 0
            while not self.readable[result[row]]:
                result[row] = replacement(index, self.num_samples, seed, epoch, attempt)
                attempt += 1
        return result

    def take(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images, sizes and labels at `ids (B,)` on the device."""
        assert self.images is not None
        images = self.images.index_select(0, ids)  # whole images: copied as blocks
        sizes = torch.tensor(images.shape[-2:], device=images.device).expand(len(ids), 2)
        return images, sizes, None if self.labels is None else self.labels[ids]

    def owners(self) -> Tensor:
        """(T,) on the host: the sample that each of all captions is of."""
        return torch.arange(self.num_samples).repeat_interleave(self.counts.cpu())

    def captions(self, ids: Tensor, seed: int, epoch: int) -> EncodedText:
        """The captions that samples `ids (B,)` show in an epoch."""
        assert self.text is not None
        rows = self.starts[ids] + drawn_captions(self.counts[ids], ids, seed, epoch)
        return EncodedText(
            self.text.ids[rows], self.text.lengths[rows], self.text.full_lengths[rows]
        )


def _read_all(source: Source, cfg: DataConfig, seed: int) -> Iterator[tuple[int, HostBatch]]:
    starts = range(0, len(source), _CHUNK)
    draws = (Draw(np.arange(s, min(s + _CHUNK, len(source))), None) for s in starts)
    yield from zip(starts, read_batches(source, cfg, seed, draws))
