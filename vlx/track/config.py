"""Where numbers go besides metrics.jsonl. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Tracker(Enum):
    none = "none"
    wandb = "wandb"


class WandbMode(Enum):
    """auto: online where an API key is configured, offline otherwise."""

    auto = "auto"
    online = "online"
    offline = "offline"


@dataclass(kw_only=True)
class TrackConfig:
    name: Tracker = Tracker.wandb
    """wandb, or none: metrics.jsonl and the console alone."""
    mode: WandbMode = WandbMode.auto
    """Where W&B writes: its server, or the run directory (`wandb sync` sends it later)."""
    project: str = "vlx"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null takes the account's default."""
    group: str | None = None
    """W&B group; a sweep sets it to its own name."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
