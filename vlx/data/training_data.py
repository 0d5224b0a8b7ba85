"""What a run was trained on, kept in its directory from the start."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from vlx.core.errors import DataError
from vlx.core.files import parse_json, write_json
from vlx.data.source import SourceInfo

FILE = "data.json"
"""In a run directory."""


@dataclass(frozen=True)
class TrainingData:
    """Of the training split, as the run opened it."""

    name: str
    split: str
    num_samples: int
    fingerprint: str
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, info: SourceInfo) -> TrainingData:
        return cls(info.name, info.split, info.num_samples, info.fingerprint, info.class_names)


def read_training_data(run_dir: Path) -> TrainingData | None:
    """None for a run that was made before this was kept.

    Raises:
        DataError: the file is damaged.
    """
    file = run_dir / FILE
    try:
        saved = parse_json(file.read_text(encoding="utf-8"))
        return TrainingData(**{**saved, "class_names": tuple(saved["class_names"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} does not say what the run was trained on: {error}") from error


def keep_training_data(run_dir: Path, info: SourceInfo, *, main: bool = True) -> None:
    """Write what a new run is trained on; check that a resumed one finds the same.

    Raises:
        DataError: the data is not what the run began with.
    """
    now, before = TrainingData.of(info), read_training_data(run_dir)
    if before is None:
        if main:
            write_json(run_dir / FILE, asdict(now))
        return
    if before.fingerprint != now.fingerprint:
        raise DataError(
            f"the data has changed: {run_dir} was trained on {_in_words(before)}, and finds "
            f"{_in_words(now)}. Put the data back as it was, or start a new run with "
            "encoder.checkpoint=RUN"
        )
    if before.class_names != now.class_names:
        raise DataError(
            f"the class names of {now.name}/{now.split} have changed since {run_dir} began: "
            f"{', '.join(sorted(set(before.class_names) ^ set(now.class_names))[:5]) or 'order'}. "
            "Put them back, or start a new run with encoder.checkpoint=RUN"
        )


def _in_words(data: TrainingData) -> str:
    return f"{data.name}/{data.split} ({data.num_samples} samples, {data.fingerprint})"
