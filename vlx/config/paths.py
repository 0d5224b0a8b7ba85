"""Where conf/ and experiments/ are: in the checkout, or in the installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """Hydra's config directory."""
    return _locate("conf")


def experiments_dir() -> Path:
    """Presets and tables, one folder a method."""
    return _locate("experiments")


def _locate(name: str) -> Path:
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def presets(slug: str) -> dict[str, Path]:
    """Preset files of a method by name."""
    return {file.stem: file for file in sorted((experiments_dir() / slug).glob("*.yaml"))}


# Folders of conf/ whose files `GROUP=NAME` chooses.
GROUPS = ("encoder", "text", "data", "optim", "schedule", "launcher", "track")


def group_options(group: str) -> list[str]:
    """Names that `group=NAME` accepts."""
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
