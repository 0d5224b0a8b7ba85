"""Weights & Biases through its own client. Offline where nobody is logged in."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from vlx.track.config import TrackConfig, WandbMode

log = logging.getLogger("vlx")


def is_logged_in() -> bool:
    """Whether the client has an API key, without asking anybody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")


def resolve_mode(cfg: TrackConfig) -> str:
    """online or offline; WANDB_MODE, where set, decides over `auto`."""
    if cfg.mode is not WandbMode.auto:
        return cfg.mode.value
    return os.environ.get("WANDB_MODE") or ("online" if is_logged_in() else "offline")


class WandbTrack:
    """One W&B run for one vlx run, resumed under the same id. A failing client never stops
    training: the first failure is logged and the rest is silent."""

    def __init__(
        self, cfg: TrackConfig, *, run_dir: Path, run_id: str, name: str, config: dict[str, Any]
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb = wandb
        self.mode = resolve_mode(cfg)
        self._broken = False
        self._run = wandb.init(
            project=cfg.project,
            entity=cfg.entity,
            group=cfg.group,
            tags=cfg.tags or None,
            id=run_id,
            name=name,
            dir=str(run_dir),
            config=config,
            resume="allow" if self.mode == "online" else None,
            mode=self.mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def _send(self, step: int, values: dict[str, Any]) -> None:
        if self._broken:
            return
        try:
            self._run.log({"global_step": step, **values})
        except Exception as error:  # losing a chart is better than losing a run
            self._broken = True
            log.warning(f"W&B stopped taking data ({error}); metrics.jsonl goes on")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._send(step, values)

    def picture(self, step: int, name: str, file: Path) -> None:
        self._send(step, {name: self._wandb.Image(str(file))})

    def table(self, step: int, name: str, columns: list[str], rows: list[list]) -> None:
        self._send(step, {name: self._wandb.Table(columns=[*columns], data=[*rows])})

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)
