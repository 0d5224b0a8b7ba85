"""The towers of a run that never change: kept beside its checkpoints, and watched."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from vlx.core.errors import VlxError
from vlx.core.method import Trainable
from vlx.encoders.frozen_towers import (
    FOLDER,
    FrozenTower,
    describe_tower,
    frozen_tensors,
    remove_unused,
    write_tower,
)

log = logging.getLogger("vlx")


@dataclass
class FrozenTowers:
    """The towers of a run. Only the main process, which writes checkpoints, describes them."""

    tensors: frozenset[str] = frozenset()
    """Names that checkpoints leave out."""
    towers: list[FrozenTower] = field(default_factory=list)
    _versions: dict[str, int] = field(default_factory=dict)

    def watch(self, method: Trainable) -> None:
        """Remember how often the tensors were written to so far: from here on, never."""
        self._versions = self._count(method)

    def check(self, method: Trainable) -> None:
        """Raise `VlxError` where one was written to since `watch`: checkpoints must hold it."""
        now = self._count(method)
        changed = [name for name, count in now.items() if self._versions[name] != count]
        if changed:
            raise VlxError(
                f"{changed[0]} and {len(changed) - 1} more changed, and the method says that they "
                "never do: take them out of `Frozen` or `frozen_parts`"
            )

    def _count(self, method: Trainable) -> dict[str, int]:
        from torch.distributed.tensor import DTensor

        state = method.state_dict(keep_vars=True)
        found = {name: state[name] for name in self.tensors}
        return {n: t._version for n, t in found.items() if not isinstance(t, DTensor)}


def keep_frozen(
    run_dir: Path, method: Trainable, saved: Mapping[str, Tensor] | None, *, main: bool
) -> FrozenTowers:
    """Write the frozen towers of a method to its run, where they are not there yet.

    Call it on every process before the weights are sharded. saved: the state dict that a resume
    will load.
    """
    by_tower = frozen_tensors(method)
    kept = FrozenTowers(frozenset(key for keys in by_tower.values() for key in keys))
    if not main:
        return kept
    state = method.state_dict() if saved is None else saved
    for name, keys in by_tower.items():
        tensors = {key[len(name) + 1 :]: state[key] for key in keys if key in state}
        tower = describe_tower(name, tensors)
        write_tower(run_dir / FOLDER, tower, tensors)
        log.info(f"frozen tower {name}: {tower.values:,} values, sha256 {tower.sha256}")
        kept.towers.append(tower)
    remove_unused(run_dir, kept.towers)
    return kept
