"""Base class of a method's own hyperparameters. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class MethodConfig:
    """The paper's own hyperparameters, the paper's values as defaults.

    A subclass is a dataclass with literal defaults and a docstring under each field. It may use
    enums defined in the same module and nothing that needs torch: the command line builds the
    schema from the class's source alone, so that a typo is answered before torch is imported.
    """
