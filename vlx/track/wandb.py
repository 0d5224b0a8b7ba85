"""Weights & Biases through its own client. Offline where nobody is logged in."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from vlx.track.config import TrackConfig, WandbMode

log = logging.getLogger("vlx")
INIT_TIMEOUT_SECONDS = 20.0


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
    training: the first failure is logged and the rest is silent.

    Steps are vlx's own, so those of a resumed run go on where it was saved; W&B ignores the ones
    that it already has. Where the server does not answer in time, the run is kept offline.
    """

    def __init__(
        self,
        cfg: TrackConfig,
        *,
        run_dir: Path,
        run_id: str,
        sweep: str | None,
        config: dict[str, Any],
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb = wandb
        self._broken = False

        def init(mode: str) -> Any:
            return wandb.init(
                project=cfg.project,
                entity=cfg.entity,
                group=cfg.group or sweep,
                tags=cfg.tags or None,
                id=run_id,
                name=run_dir.name,
                dir=str(run_dir),
                config=config,
                resume="allow" if mode == "online" else None,
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(
                    silent=True, console="off", init_timeout=INIT_TIMEOUT_SECONDS
                ),
            )

        self.mode = resolve_mode(cfg)
        try:
            self._run = init(self.mode)
        except Exception as error:
            if self.mode != "online":
                raise
            log.warning(
                f"W&B does not answer ({_first_line(error)}); the run is kept offline, "
                f"`wandb sync` sends it later"
            )
            self.mode = "offline"
            wandb.teardown()  # the client's service still holds the run id
            self._run = init(self.mode)

    def _send(self, step: int, values: dict[str, Any]) -> None:
        if self._broken:
            return
        try:
            self._run.log(values, step=step)
        except Exception as error:  # losing a chart is better than losing a run
            self._broken = True
            log.warning(f"W&B stopped taking data ({_first_line(error)}); metrics.jsonl goes on")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._send(step, values)

    def picture(self, step: int, name: str, file: Path) -> None:
        if not self._broken:
            self._send(step, {name: self._wandb.Image(str(file))})

    def table(self, step: int, name: str, columns: list[str], rows: list[list]) -> None:
        if not self._broken:
            self._send(step, {name: self._wandb.Table(columns=[*columns], data=[*rows])})

    def close(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            log.warning(f"W&B did not close the run ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
