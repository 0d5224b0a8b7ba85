"""From a source to batches on the device, in an order that any step can be resumed at."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vlx.core import random
from vlx.core.errors import ConfigError, DataError, nearest
from vlx.core.fields import IMAGE, LABEL, TEXT, TEXT_LENGTH, Batch, Needs
from vlx.core.text import Tokenizer
from vlx.data.config import DataConfig, Resident
from vlx.data.host import (
    BadSamples,
    Draw,
    HostBatch,
    HostDataset,
    read_batches,
)
from vlx.data.order import balanced, repeated
from vlx.data.resident import Residents
from vlx.data.source import Source, WithDomains
from vlx.data.text import CaptionCounts, EncodedText, to_device
from vlx.data.views import make_views
from vlx.ops.augment import HorizontalFlip, RandomCrop

log = logging.getLogger("vlx")
_PROBED = 16  # samples read to see whether all images have one size
_CARRIED = {LABEL.name, TEXT.name, TEXT_LENGTH.name}  # as they are, beside views
_ENCODERS = {8: "digits", 32: "cifar"}  # conf/encoder: made for images of this side


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this process takes."""

    batch_size: int
    """Samples a step, over all processes and micro-batches."""
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.world * self.accumulate):
            raise ConfigError(
                f"train.batch_size={self.batch_size} does not divide over {self.world} processes "
                f"x {self.accumulate} micro-batches (train.accumulate)"
            )

    @property
    def micro(self) -> int:
        """Samples of one micro-batch of one process."""
        return self.batch_size // (self.world * self.accumulate)

    def offset(self, micro_step: int) -> int:
        """Position in the global batch of this process's micro-batch."""
        return (micro_step * self.world + self.rank) * self.micro

    def positions(self, micro_step: int, *, spread: bool = False) -> np.ndarray:
        """(micro,) places in the global batch of this process's micro-batch, int64.

        One run of places; or, spread, every `world`-th, as DeiT's sampler hands out repeated
        samples: copies that lie next to each other come to different processes.
        """
        if not spread:
            return self.offset(micro_step) + np.arange(self.micro)
        start = micro_step * self.world * self.micro
        return start + self.rank + self.world * np.arange(self.micro)


def check_fields(source: Source, needs: Needs) -> None:
    """Raise `DataError` when the source lacks a field that the method reads, or the pipeline has no
    way for it."""
    for name in needs.source_fields:
        if name not in source.info.fields:
            raise DataError(
                f"the method needs the field '{name}'; {source.info.name} has "
                f"{', '.join(source.info.fields)}. {nearest(name, source.info.fields, 1)}"
            )
    made: set[str] = set()
    for view in needs.views:
        if view.of not in made and view.of != IMAGE.name:
            raise DataError(
                f"the view '{view.name}' is of the field '{view.of}': views are made of "
                f"'{IMAGE.name}' or of a view declared before ({', '.join(sorted(made)) or 'none'})"
            )
        made.add(view.name)
    for field in needs.fields:
        if field.name not in _CARRIED:
            raise DataError(
                f"the method reads the field '{field.name}': batches carry "
                f"{', '.join(sorted(_CARRIED))} beside views"
            )


def probe_sizes(source: Source, cfg: DataConfig) -> Tensor:
    """`(P, 2)` heights and widths of a few samples spread over the source."""
    probe = np.unique(np.linspace(0, len(source) - 1, _PROBED).astype(int))
    return HostDataset(source, cfg, 0)[Draw(probe, None)].sizes


def fits(sizes: Tensor, num_samples: int, cfg: DataConfig) -> bool:
    """Whether the source is kept on the device, given the `sizes` of a few of its samples."""
    if cfg.resident is not Resident.auto:
        return cfg.resident is Resident.always
    if len(sizes) == 0 or not bool((sizes == sizes[0]).all()):
        return False
    return num_samples * 3 * int(sizes[0].prod()) <= cfg.resident_limit_mb << 20


def check_crops(source: Source, sizes: Tensor, image_size: int, needs: Needs) -> None:
    """Raise `ConfigError` where a random window is larger than the padded images: training would
    see small pictures in a black frame, and evaluation enlarged ones."""
    for view in needs.views:
        for op in view.ops:
            if not isinstance(op, RandomCrop) or len(sizes) == 0:
                continue
            side, wanted = int(sizes.max()), view.size or image_size
            if side + 2 * op.padding < wanted:
                raise ConfigError(
                    f"images of {source.info.name} are {side} pixels wide and method.crop_padding="
                    f"{op.padding} cuts windows of {wanted} from them. Use encoder.image_size="
                    f"{side}, or method.crop_padding=null, which resizes"
                )


def check_mirror(source: Source, needs: Needs) -> None:
    """Raise `ConfigError` where a view mirrors images whose captions speak of left and right."""
    if not needs.text or source.info.mirror_safe:
        return
    for view in needs.views:
        for op in view.ops:
            if isinstance(op, HorizontalFlip) and op.p > 0:
                raise ConfigError(
                    f"captions of {source.info.name} do not survive a mirror (left and right, "
                    "letters): set method.flip=0"
                )


def samples_by_domain(source: Source, batch_size: int) -> list[np.ndarray]:
    """The samples of every domain that has any; for `data.balance_domains`.

    Raises `ConfigError` where the source knows no domains or they do not divide a batch.
    """
    info = source.info
    if not info.domain_names or not isinstance(source, WithDomains):
        raise ConfigError(
            f"data.balance_domains: {info.name}/{info.split} knows no domains; these do: faces of "
            "glyphs (train:DejaVuSans+DejaVuSerif), folders joined by + (photo+sketch)"
        )
    own = source.domains()
    found = [np.flatnonzero(own == domain) for domain in np.unique(own)]
    if batch_size % len(found):
        raise ConfigError(
            f"train.batch_size={batch_size} is no multiple of the {len(found)} domains of "
            f"{info.name}/{info.split} ({', '.join(info.domain_names)}), as data.balance_domains "
            "needs"
        )
    return found


def _warn_of_size(source: Source, sizes: Tensor, image_size: int) -> None:
    """Say so where all images have one size that is far from what the encoder sees.

    Photos twice as large, or of many sizes, are what crops are made for: no warning.
    """
    if len(sizes) == 0 or not bool((sizes == sizes[0]).all()):
        return
    height, width = sizes[0].tolist()
    side = min(height, width)
    if image_size <= side <= 2 * image_size:
        return
    chosen = f"encoder={_ENCODERS[side]} or " if side in _ENCODERS else ""
    log.warning(
        f"images of {source.info.name} are {height}x{width}, the encoder sees "
        f"{image_size}x{image_size}. To train at their own size: {chosen}encoder.image_size={side}"
    )


class TrainPipeline:
    """Batches of training, step by step; what a step holds depends on (seed, step) alone."""

    def __init__(
        self,
        source: Source,
        needs: Needs,
        *,
        cfg: DataConfig,
        image_size: int,
        seed: int,
        share: Share,
        device: torch.device,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_fields(source, needs)
        check_mirror(source, needs)
        self.tokenizer = tokenizer if needs.text else None
        if needs.text and tokenizer is None:
            raise ConfigError("the method reads captions: choose a tokenizer, e.g. text=clip")
        if cfg.repeats < 1:
            raise ConfigError(f"data.repeats={cfg.repeats} must be at least 1, which repeats none")
        if cfg.repeats > 1 and cfg.balance_domains:
            raise ConfigError("data.repeats and data.balance_domains exclude each other: unset one")
        self.source, self.needs, self.cfg = source, needs, cfg
        self.image_size, self.seed, self.share, self.device = image_size, seed, share, device
        self.domains = samples_by_domain(source, share.batch_size) if cfg.balance_domains else []
        self.steps_per_epoch = len(source) // share.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"train.batch_size={share.batch_size} is larger than the {len(source)} samples of "
                f"{source.info.name}/{source.info.split}: lower it"
            )
        probed = probe_sizes(source, cfg)
        check_crops(source, probed, image_size, needs)
        _warn_of_size(source, probed, image_size)
        resident = fits(probed, len(source), cfg)
        self.caption_counts = CaptionCounts()
        self.residents = None
        if resident:
            self.residents = Residents(source, cfg, seed, device, self.tokenizer)
            if self.residents.text is not None and self.tokenizer is not None:
                text = to_device(self.residents.text, torch.device("cpu"))
                name = partial(self._sample_name, self.residents.owners())
                self.caption_counts.add(text, name)
                log.info(self.caption_counts.line(self.tokenizer.context_length))
        self.bad = (
            self.residents.bad if self.residents else BadSamples(len(source), cfg.corrupt_limit)
        )

    def indices(self, step: int, micro_step: int) -> np.ndarray:
        """Sample indices of one micro-batch of this process."""
        return self._order(step, micro_step)[0]

    def _order(self, step: int, micro_step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices and copy numbers of one micro-batch of this process."""
        if self.domains:
            positions = step * self.share.batch_size + self.share.positions(micro_step)
            return balanced(positions, self.domains, self.seed)
        epoch, within = divmod(step, self.steps_per_epoch)
        places = self.share.positions(micro_step, spread=self.cfg.repeats > 1)
        positions = within * self.share.batch_size + places
        return repeated(positions, len(self.source), self.seed, epoch, self.cfg.repeats)

    def _plan(self, start_step: int, total_steps: int) -> Iterator[tuple[int, int]]:
        for step in range(start_step, total_steps):
            for micro in range(self.share.accumulate):
                yield step, micro

    def batches(self, start_step: int, total_steps: int) -> Iterator[Batch]:
        """Micro-batches on the device, `accumulate` of them a step."""
        plan = self._plan(start_step, total_steps)
        if self.residents is not None:
            for step, micro in plan:
                yield self._resident_batch(self.residents, step, micro)
            return
        draws = (Draw(self.indices(s, m), s // self.steps_per_epoch) for s, m in plan)
        pin = self.device.type == "cuda"
        hosts = read_batches(
            self.source, self.cfg, self.seed, draws, pin=pin, tokenizer=self.tokenizer
        )
        # A second walk through the plan: workers run ahead of it in the first.
        for host, (step, micro) in zip(hosts, self._plan(start_step, total_steps)):
            for line in self.bad.add(host.bad):
                log.warning(line)
            images, sizes, ids, labels = _to_device(host, self.device)
            batch = self._views(images, sizes, ids, labels, self._keys(ids, step, micro))
            if host.text is not None:
                name = partial(self._sample_name, host.sample_id)
                self.caption_counts.add(host.text, name)
                self._add_text(batch, to_device(host.text, self.device))
            yield batch

    def _sample_name(self, ids: Tensor, row: int) -> str:
        return self.source.describe(int(ids[row]))

    def _resident_batch(self, residents: Residents, step: int, micro: int) -> Batch:
        epoch = step // self.steps_per_epoch
        indices = residents.resolve(self.indices(step, micro), self.seed, epoch)
        ids = torch.from_numpy(indices).to(self.device)
        images, sizes, labels = residents.take(ids)
        batch = self._views(images, sizes, ids, labels, self._keys(ids, step, micro))
        if residents.text is not None:
            self._add_text(batch, residents.captions(ids, self.seed, epoch))
        return batch

    def _add_text(self, batch: Batch, text: EncodedText) -> None:
        found = {"text": text.ids, "text_length": text.lengths}
        batch.update({f.name: found[f.name] for f in self.needs.fields if f.name in found})

    def _keys(self, ids: Tensor, step: int, micro_step: int) -> Tensor:
        """(B,) what each sample's augmentation is drawn from: seed, epoch, sample and copy."""
        keys = random.key(ids, self.seed, step // self.steps_per_epoch)
        if self.cfg.repeats == 1 and not self.domains:
            return keys
        copies = torch.from_numpy(self._order(step, micro_step)[1])
        return random.mix(keys + copies.to(ids.device))

    def _views(
        self, images: Tensor, sizes: Tensor, ids: Tensor, labels: Tensor | None, keys: Tensor
    ) -> Batch:
        batch = make_views(images, sizes, keys, self.needs.views, self.image_size)
        batch["sample_id"] = ids
        if labels is not None and any(f.name == "label" for f in self.needs.fields):
            batch["label"] = labels
        return batch


def _to_device(
    host: HostBatch, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    labels = None if host.labels is None else host.labels.to(device, non_blocking=True)
    return (
        host.images.to(device, non_blocking=True),
        host.sizes.to(device, non_blocking=True),
        host.sample_id.to(device, non_blocking=True),
        labels,
    )


class EvalPipeline:
    """Every readable sample once, in order, under a deterministic view."""

    def __init__(
        self,
        source: Source,
        needs: Needs,
        *,
        cfg: DataConfig,
        image_size: int,
        batch_size: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_fields(source, needs)
        self.source, self.needs, self.cfg = source, needs, cfg
        self.image_size, self.batch_size, self.device = image_size, batch_size, device
        self.rank, self.world = rank, world
        self.bad = BadSamples(len(source), cfg.corrupt_limit)

    def own(self, ids: Tensor) -> Tensor:
        """(B,) bool: which samples of a batch are of this process's share, not repeated to fill."""
        return ids // self.batch_size % self.world == self.rank

    def batches(self) -> Iterator[Batch]:
        """Batches of this process's share, with `sample_id` and, where there are any, `label`.

        Every process yields equally many batches; the last may repeat a sample: see `own`.
        """
        rounds = -(-len(self.source) // (self.batch_size * self.world))
        starts = [(r * self.world + self.rank) * self.batch_size for r in range(rounds)]
        draws = (
            Draw(np.arange(s, s + self.batch_size).clip(max=len(self.source) - 1), None)
            if s >= len(self.source)
            else Draw(np.arange(s, min(s + self.batch_size, len(self.source))), None)
            for s in starts
        )
        for host in read_batches(self.source, self.cfg, 0, draws):
            for line in self.bad.add(host.bad):
                log.warning(line)
            images, sizes, ids, labels = _to_device(host, self.device)
            batch = make_views(images, sizes, ids, self.needs.views, self.image_size)
            batch["sample_id"] = ids
            if labels is not None:
                batch["label"] = labels
            yield batch
