"""The schema of `results.json`: tables are built on it, so a change is a new version."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from vlx.core.errors import VlxError
from vlx.core.results import FILE_NAME, SCHEMA_VERSION, Metric, Results, read_results

METRIC = ["name", "value", "unit", "split", "num_samples", "protocol", "weights"]
RESULTS = [
    "schema_version",
    "run",
    "command",
    "method",
    "preset",
    "seed",
    "config_hash",
    "data_fingerprint",
    "weights_checksum",
    "steps",
    "epochs",
    "final_losses",
    "metrics",
    "bad_samples",
    "hardware",
    "versions",
    "commit",
    "wall_time_s",
    "peak_memory_mb",
    "finished",
    "pictures",
    "counts",
    "on_training_data",
]


def metric(name: str = "knn/top1", value: float = 0.5, weights: str = "trained") -> Metric:
    return Metric(
        name=name,
        value=value,
        unit="share",
        split="digits/test",
        num_samples=360,
        protocol="knn@1",
        weights=weights,
    )


def results() -> Results:
    return Results(
        run="first",
        command="pretrain-mim",
        method="mae",
        preset="smoke",
        seed=0,
        config_hash="0" * 12,
        data_fingerprint="1" * 16,
        weights_checksum="2" * 16,
        steps=4,
        epochs=0.2,
        final_losses={"recon": 1.0},
        metrics=[metric(value=0.25, weights="untrained"), metric()],
        bad_samples=0,
        hardware={"device": "cpu"},
        versions={"torch": "2"},
        commit="",
        wall_time_s=1.0,
        peak_memory_mb=100.0,
        finished="2026-11-24T12:00:00+00:00",
        pictures=["pictures/a.png"],
    )


def test_the_schema_is_pinned() -> None:
    assert SCHEMA_VERSION == 3
    assert [f.name for f in fields(Metric)] == METRIC
    assert [f.name for f in fields(Results)] == RESULTS


def test_the_file_holds_exactly_the_schema_and_reads_back(tmp_path: Path) -> None:
    path = results().write(tmp_path)
    raw = json.loads(path.read_text())
    assert list(raw) == RESULTS
    assert [list(entry) for entry in raw["metrics"]] == [METRIC, METRIC]
    assert read_results(tmp_path) == results()
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


def test_values_are_found_by_name_and_weights() -> None:
    assert results().value("knn/top1") == 0.5
    assert results().value("knn/top1", "untrained") == 0.25
    assert results().value("knn/top5") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        json.dumps(asdict(results()))[:200],
        "[]",
        "3",
        "null",
        "{}",
        '{"schema_version": 1}',
        json.dumps(asdict(results()) | {"metrics": [{"name": "knn"}]}),
        json.dumps(asdict(results()) | {"metrics": 3}),
        json.dumps(asdict(results()) | {"schema_version": 4}),
    ],
)
def test_half_written_and_foreign_files_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(VlxError, match=str(tmp_path / FILE_NAME)):
        read_results(tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff\x00\xfe")
    with pytest.raises(VlxError, match=FILE_NAME):
        read_results(tmp_path)
