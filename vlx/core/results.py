"""`results.json`: what a run measured and all that is needed to cite it. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vlx.core.errors import VlxError
from vlx.core.files import parse_json, write_json

SCHEMA_VERSION = 3
_READABLE = (1, 2, 3)  # 2 adds `counts`, 3 `on_training_data`
FILE_NAME = "results.json"


@dataclass(kw_only=True)
class Metric:
    """One number with what it means."""

    name: str
    """`<evaluator>/<metric>`, e.g. knn/top1."""
    value: float
    unit: str
    """share (0..1), loss, images/s ..."""
    split: str
    """Data set and split that it was measured on."""
    num_samples: int
    protocol: str
    """`<name>@<version>` of the evaluation protocol."""
    weights: str
    """trained, untrained, ema or swad."""


@dataclass(kw_only=True)
class Results:
    """The content of `results.json`; `tests/core/test_results.py` pins the keys."""

    schema_version: int = SCHEMA_VERSION
    run: str
    command: str
    method: str
    preset: str
    seed: int
    config_hash: str
    data_fingerprint: str
    weights_checksum: str
    steps: int
    epochs: float
    final_losses: dict[str, float]
    metrics: list[Metric]
    bad_samples: int
    hardware: dict[str, Any]
    versions: dict[str, str]
    commit: str
    wall_time_s: float
    peak_memory_mb: float
    finished: str
    pictures: list[str] = field(default_factory=list)
    """Paths relative to the run directory."""
    counts: dict[str, list[int]] = field(default_factory=dict)
    """`<evaluator>/<what>` by layer, e.g. tokens/tokens-in-mlp."""
    on_training_data: str = ""
    """Where samples that were trained on were scored: "scored on training data: how many of how
    many, of what"."""

    def write(self, run_dir: Path) -> Path:
        """Write `results.json` of a run directory atomically."""
        path = run_dir / FILE_NAME
        write_json(path, asdict(self))
        return path

    def value(self, name: str, weights: str = "trained") -> float | None:
        """The metric of that name, or None."""
        for metric in self.metrics:
            if metric.name == name and metric.weights == weights:
                return metric.value
        return None


def read_results(run_dir: Path) -> Results:
    """Read and check `results.json`; a half-written or foreign file raises `VlxError`."""
    path = run_dir / FILE_NAME
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
        if raw.get("schema_version") not in _READABLE:
            raise VlxError(
                f"{path}: schema version {raw.get('schema_version')} is not {SCHEMA_VERSION}"
            )
        raw["metrics"] = [Metric(**metric) for metric in raw["metrics"]]
        known = {f.name for f in fields(Results)}
        return Results(**{key: value for key, value in raw.items() if key in known})
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise VlxError(f"{path} is not a result of vlx: {error}") from error
