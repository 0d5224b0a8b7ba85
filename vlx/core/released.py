"""Names of released files as names of a model here: one table a method, beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

Renames = Sequence[tuple[str, str | Callable[[re.Match[str]], str] | None]]
"""Pattern of a part of a name, and what stands there instead (as `re.sub` takes it); None leaves a
tensor whose name has the pattern out. Each acts in turn on what those before it left."""


@runtime_checkable
class Released(Protocol):
    """A model, or a method, whose weights were released under other names."""

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A released state under one's own names and in one's own shapes; a state that has them
        already stays as it is."""
        ...


def renamed(state: Mapping[str, Tensor], table: Renames) -> dict[str, Tensor]:
    """The tensors of `state` by the names that `table` gives them."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        new: str | None = name.removeprefix("module.")
        for pattern, instead in table:
            if instead is None:
                new = None if re.search(pattern, new) else new
            else:
                new = re.sub(pattern, instead, new)
            if new is None:
                break
        if new is not None:
            found[new] = value
    return found


def next_stage(rest: str) -> Callable[[re.Match[str]], str]:
    """Of a part that belongs to the end of stage `\\1` there and to the start of the next one here:
    `stages.N.` and then `rest`."""
    return lambda match: f"stages.{int(match[1]) + 1}.{rest}"
