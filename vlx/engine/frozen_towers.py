"""The towers of a run that never change: kept beside its checkpoints, and watched."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from vlx.core.errors import VlxError
from vlx.core.method import Trainable
from vlx.encoders.frozen_towers import (
    FOLDER,
    FrozenTower,
    describe_tower,
    directory_of,
    frozen_tensors,
    remove_unused,
    write_tower,
)
from vlx.engine import checkpoint

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
    run_dir: Path, method: Trainable, saved: checkpoint.Snapshot | None, *, main: bool
) -> FrozenTowers:
    """Write the frozen towers of a method to its run, where they are not there yet.

    Call it on every process before the weights are sharded. saved: what a resume will load.
    """
    by_tower = frozen_tensors(method)
    kept = FrozenTowers(frozenset(key for keys in by_tower.values() for key in keys))
    if not main:
        return kept
    state = method.state_dict() if saved is None else saved.model
    known = {} if saved is None else {tower.name: tower for tower in saved.towers}
    for name, keys in by_tower.items():
        tensors = {key[len(name) + 1 :]: state[key] for key in keys if key in state}
        # A resume's method has other weights so far than those that will be loaded.
        source = directory_of(method.get_submodule(name)) if saved is None else None
        tower = describe_tower(name, tensors, source)
        if name in known and known[name].sha256 == tower.sha256:
            tower = known[name]
        write_tower(run_dir / FOLDER, tower, tensors)
        log.info(f"frozen tower {name}: {tower.values:,} values, sha256 {tower.sha256}")
        kept.towers.append(tower)
    remove_unused(run_dir, kept.towers)
    return kept
