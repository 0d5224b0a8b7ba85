"""What a source of data is: samples by index, read and not yet augmented."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

Sample = dict[str, Any]
"""Fields by name. `image` is encoded bytes or a uint8 array (H, W, 3); `label` is an int;
`caption` is a list of one or more texts."""


@dataclass(frozen=True)
class SourceInfo:
    """What is known of a source before anything is read."""

    name: str
    split: str
    num_samples: int
    fields: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    fingerprint: str = ""
    """Digest of the content, written into every result."""
    mirror_safe: bool = True
    """False where left and right carry meaning (digits, text): flips then harm."""
    domain_names: tuple[str, ...] = ()
    """Of a source that knows the domain of every sample, and so is `WithDomains`."""
    extra: dict[str, str] = field(default_factory=dict)
    """What else is known; `image`, the column of images, where there are several to choose from."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class Source(Protocol):
    """Index-addressable samples. Must be picklable: worker processes get a copy."""

    @property
    def info(self) -> SourceInfo: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """The sample, undecoded where it can be; raises any exception for a damaged one."""
        ...

    def describe(self, index: int) -> str:
        """A name that a person finds the sample by: a file, a row of a file."""
        ...

    def labels(self) -> np.ndarray | None:
        """(N,) int64 without decoding images; None where the source has no labels."""
        ...


@runtime_checkable
class Captioned(Protocol):
    """A source whose samples have captions; `info.fields` then holds `caption`."""

    def captions(self, index: int) -> list[str]:
        """All captions of a sample, without reading its image: what `read(index)["caption"]` holds.

        Raises `ValueError` for a sample whose captions cannot be used (empty, not UTF-8).
        """
        ...


@runtime_checkable
class WithDomains(Protocol):
    """A source whose samples come from several domains; `info.domain_names` then names them."""

    def domains(self) -> np.ndarray:
        """(N,) int64: every sample's domain, a place in `info.domain_names`."""
        ...
