"""The metadata of a paper. Importable without torch: the registry reads it with `ast`."""

from __future__ import annotations

from dataclasses import dataclass

COMMANDS = ("pretrain-mim", "align", "finetune", "prune-tokens", "eval")


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """One published method, written in its module as `PAPER = Paper(...)` with literals only.

    The published figures are those of the `paper` preset; a contract test compares them with
    the model that the preset builds. `number` is 0 for base methods outside the list of 103.
    """

    number: int
    slug: str
    title: str
    year: int
    venue: str
    url: str
    family: str
    commands: tuple[str, ...]
    modalities: tuple[str, ...]
    trainable_params: int | None = None
    """Trainable parameters of the `paper` preset, as published."""
    gmacs: float | None = None
    """Multiply-accumulates of one training forward of one sample, in 1e9; for a method that reduces
    tokens, of one image at inference."""
    num_classes: int = 1000
    """Classes that these two figures count."""
    backbones: tuple[str, ...] = ()
    """Names under which the module registers models with timm; `encoder.name` finds them."""
    sweep: tuple[str, ...] = ()
    """Overrides with several values each, the paper's own rates: what `--sweep` runs."""
    waive: tuple[tuple[str, str], ...] = ()
    """(contract check, reason): the only place for an exception."""
