"""Numbers as the terminal shows them."""

from __future__ import annotations

import pytest

from tests.commands.conftest import text_console, text_of
from vlx.commands.runs import headline
from vlx.commands.tables import counts_lines, figure, results_tables
from vlx.core.results import Metric, Results


def metric(name: str, value: float, unit: str = "share", weights: str = "trained") -> Metric:
    protocol = f"{name.split('/')[0]}@1"
    return Metric(
        name=name, value=value, unit=unit, split="digits/test", num_samples=360,
        protocol=protocol, weights=weights,
    )  # fmt: skip


def results(*metrics: Metric, **counts: list[int]) -> Results:
    return Results(
        run="r", command="", method="evit", preset="", seed=0, config_hash="",
        data_fingerprint="", weights_checksum="", steps=4, epochs=1, final_losses={},
        metrics=list(metrics), bad_samples=0, hardware={}, versions={}, commit="",
        wall_time_s=0, peak_memory_mb=0, finished="",
        counts={f"tokens/tokens-in-{name}": count for name, count in counts.items()},
    )  # fmt: skip


def shown(found: Results) -> list[list[str]]:
    """Every line of the tables as its cells."""
    console = text_console()
    for table in results_tables(found):
        console.print(table)
    text = text_of(console).replace("┃", "│")
    return [[cell.strip() for cell in row.split("│")] for row in text.splitlines()]


TOKENS = (
    metric("tokens/top1/plain", 0.1, weights="untrained"),
    metric("tokens/top1/reduced", 0.11, weights="untrained"),
    metric("tokens/top1/plain", 0.9472),
    metric("tokens/top1/reduced", 0.9),
    metric("tokens/gmacs/plain", 4.6, "GMACs/image"),
    metric("tokens/gmacs/reduced", 3.029, "GMACs/image"),
    metric("tokens/images-per-s-batch8/plain", 12345.6, "images/s"),
    metric("tokens/images-per-s-batch8/reduced", 18000, "images/s"),
    metric("tokens/peak-memory/plain", 0.00012, "MiB"),
)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.9472, "share", "0.9472"),
        (1.0, "share", "1.0000"),
        (0.0242, "squared error", "0.0242"),
        (0.00012345, "share", "0.000123"),
        (1.2e-7, "GMACs", "1.20e-07"),
        (0.63741, "ratio", "0.637"),
        (4.599, "GMACs", "4.60"),
        (123.4, "MiB", "123"),
        (999.7, "images/s", "1,000"),
        (12345.6, "images/s", "12,346"),
        (0, "GMACs", "0"),
        (-2.5, "loss", "-2.50"),
    ],
)
def test_a_number_is_never_zeros_or_noise(value: float, unit: str, text: str) -> None:
    assert figure(value, unit) == text


def test_a_pair_is_one_row_with_its_ratio_and_unit() -> None:
    rows = shown(results(*TOKENS))
    assert rows[0] == ["evit on digits/test, 4 steps, tokens@1"]
    assert rows[2][1:-1] == ["metric", "weights", "plain", "reduced", "ratio", "unit"]
    assert [row[1:-1] for row in rows[4:-1]] == [
        ["tokens/top1", "untrained", "0.1000", "0.1100", "1.10", "share"],
        ["tokens/top1", "trained", "0.9472", "0.9000", "0.950", "share"],
        ["tokens/gmacs", "trained", "4.60", "3.03", "0.658", "GMACs/image"],
        ["tokens/images-per-s-batch8", "trained", "12,346", "18,000", "1.46", "images/s"],
        ["tokens/peak-memory", "trained", "0.000120", "", "", "MiB"],
    ]


def test_other_metrics_have_their_own_table_beside_it() -> None:
    knn = (metric("knn/top1", 0.5, weights="untrained"), metric("knn/top1", 0.94))
    rows = shown(results(*knn, *TOKENS[2:]))
    assert ["", "knn/top1", "0.5000", "0.9400", "360", "knn@1", ""] in rows
    assert ["", "tokens/gmacs", "4.60", "3.03", "0.658", "GMACs/image", ""] in rows  # no weights
    assert len(results_tables(results(*knn))) == 1
    assert len(results_tables(results())) == 1


def test_counts_are_one_line_each() -> None:
    found = results(attention=[65, 65, 47, 35, 35], mlp=[65, 47, 35, 35, 35])
    assert counts_lines(found) == [
        "tokens in attention: 65 x 2, 47, 35 x 2",
        "tokens in mlp: 65, 47, 35 x 3",
    ]


def test_the_headline_is_the_reduced_models() -> None:
    best = headline(results(*TOKENS))
    assert best is not None
    assert (best.name, best.value) == ("tokens/top1/reduced", 0.9)
    without_labels = headline(results(*TOKENS[4:]))
    assert without_labels is not None
    assert without_labels.name == "tokens/gmacs/reduced"
    assert headline(results()) is None
