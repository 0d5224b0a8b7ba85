"""Features of finished models on disk: the next evaluation of the same model reads them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlx.data.cache import cache_dir, digest

log = logging.getLogger("vlx")
Tensors = dict[str, Tensor]


class FeatureCache:
    """Files of `~/.cache/vlx/features`, each whole or not there; any of them may be deleted.

    Only for a model whose weights do not change any more.
    """

    def __init__(self, identity: str, *, rank: int = 0, world: int = 1) -> None:
        """identity: digest of all that the model computes from: weights, architecture, code."""
        self.identity, self.rank, self.world = identity, rank, world

    def once(
        self,
        what: str,
        parts: tuple[str, ...],
        build: Callable[[], Tensors],
        *,
        rows: int | None,
        device: torch.device,
    ) -> Tensors:
        """The tensors that `what` of `parts` (data, transform, texts) gave before, else built.

        rows: their length when nothing was unreadable. Others are not kept: every evaluation
        shall name what cannot be read. None keeps nothing.
        """
        if rows is None:
            return build()
        file = cache_dir() / "features" / f"{what}-{digest(self.identity, *parts)}.safetensors"
        kept = self._from_main(file)
        if kept is not None:
            log.info(f"features read from {file}, not computed again")
            return {name: tensor.to(device) for name, tensor in kept.items()}
        made = build()
        if self.rank == 0 and all(len(tensor) == rows for tensor in made.values()):
            _write(file, made)
        return made

    def _from_main(self, file: Path) -> Tensors | None:
        """What the main process finds: the others' machines may have no such file."""
        found = [_read(file) if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]


def _read(file: Path) -> Tensors | None:
    try:
        return load_file(file)
    except (OSError, SafetensorError):  # absent, or damaged: written anew
        return None


def _write(file: Path, tensors: Tensors) -> None:
    tmp = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, tmp)
            os.replace(tmp, file)
        finally:
            tmp.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        log.warning(f"cannot keep features in {file}: {error}. They are computed every time")
