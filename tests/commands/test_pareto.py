"""Trade-offs of a sweep: which points are optimal, where they stand, what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.commands.conftest import text_console, text_of
from vlx.commands.measured import Measured
from vlx.commands.pareto import PLOT_FILE, Point, scatter, show_tradeoffs, tradeoffs
from vlx.commands.summary import groups_table, jobs_table, over_seeds


def job(
    rate: str,
    top1: float | None,
    gmacs: float,
    speed: float,
    *,
    seed: int = 0,
    plain: tuple[float | None, float, float] = (0.9, 4.0, 100.0),
) -> Measured:
    metrics = {}
    for kind, (accuracy, cost, rapid) in {"plain": plain, "reduced": (top1, gmacs, speed)}.items():
        if accuracy is not None:
            metrics[f"tokens/top1/{kind}"] = accuracy
        metrics[f"tokens/gmacs/{kind}"] = cost
        metrics[f"tokens/images-per-s-batch1/{kind}"] = 1.0
        metrics[f"tokens/images-per-s-batch8/{kind}"] = rapid
        metrics[f"tokens/peak-memory/{kind}"] = 2 * cost
    return Measured(
        id=f"00{seed}-{rate}", state="finished", exit_code=0, seed=seed,
        swept={"method.keep_rate": rate, "seed": str(seed)}, overrides=[], run_dir="r",
        metrics=metrics,
    )  # fmt: skip


GROUPS = [
    [job("0.9", 0.91, 3.6, 90, seed=0, plain=(0.92, 4.0, 100)),
     job("0.9", 0.93, 3.6, 130, seed=1, plain=(0.94, 4.0, 100))],
    [job("0.7", 0.85, 2.8, 150), job("0.7", 0.85, 2.8, 150, seed=1)],
    [job("0.5", 0.85, 2.0, 140), job("0.5", 0.85, 2.0, 140, seed=1)],
]  # fmt: skip


def by_label(points: list[Point]) -> dict[str, Point]:
    return {point.label: point for point in points}


def test_points_go_by_gmacs_and_the_plain_model_is_one_of_them() -> None:
    points = tradeoffs(GROUPS)
    assert [point.label for point in points] == [
        "keep_rate 0.5", "keep_rate 0.7", "keep_rate 0.9", "plain",
    ]  # fmt: skip
    assert [point.mark for point in points] == ["a", "b", "c", "*"]
    plain = points[-1]
    assert plain.top1 is not None
    assert plain.top1.mean == pytest.approx(0.93)  # of the mildest setting
    assert plain.speedup is not None
    assert (plain.speedup.mean, plain.gmacs.mean) == (1.0, 4.0)


def test_seeds_give_mean_and_deviation_and_speedups_are_each_runs_own() -> None:
    mild = by_label(tradeoffs(GROUPS))["keep_rate 0.9"]
    assert mild.top1 is not None
    assert mild.speedup is not None
    assert mild.top1.mean == pytest.approx(0.92)
    assert mild.top1.std == pytest.approx(0.02 / 2**0.5)
    assert mild.speedup.mean == pytest.approx((0.9 + 1.3) / 2)
    assert mild.batch == 8  # the largest that was measured


def test_optimal_is_what_no_other_point_beats() -> None:
    found = {label: point.optimal for label, point in by_label(tradeoffs(GROUPS)).items()}
    assert found == {
        "keep_rate 0.5": ("gmacs",),  # as good as 0.7 with fewer GMACs, and slower than it
        "keep_rate 0.7": ("images_per_s",),
        "keep_rate 0.9": ("gmacs", "images_per_s"),
        "plain": ("gmacs", "images_per_s"),
    }


def test_a_dominated_point_is_optimal_in_nothing() -> None:
    groups = [[job("0.9", 0.95, 3, 150)], [job("0.7", 0.80, 3.5, 120)]]
    assert by_label(tradeoffs(groups))["keep_rate 0.7"].optimal == ()
    assert by_label(tradeoffs(groups))["plain"].optimal == ()


def test_other_sizes_have_their_own_plain_model() -> None:
    small = [job("0.8", 0.6, 1.0, 300, plain=(0.7, 1.5, 250))]
    plain = [point for point in tradeoffs([*GROUPS, small]) if point.label == "plain"]
    assert [point.gmacs.mean for point in plain] == [1.5, 4.0]


def test_the_terminal_plot_has_every_mark_in_its_place() -> None:
    text = scatter(tradeoffs(GROUPS)).plain
    lines = text.splitlines()
    rows = {mark: next(n for n, row in enumerate(lines[1:]) if mark in row) for mark in "abc*"}
    assert rows["*"] < rows["c"] < rows["a"] == rows["b"]
    columns = {mark: lines[1 + row].index(mark) for mark, row in rows.items()}
    assert columns["*"] < columns["c"] < columns["a"] < columns["b"]  # by images/s
    assert "0.9300" in lines[1]
    assert "0.8500" in lines[14]
    assert lines[-2].split() == ["100", "150"]
    assert "images/s, batch 8" in lines[-1]


def test_table_and_picture_of_a_sweep(tmp_path: Path) -> None:
    console = text_console()
    show_tradeoffs(tmp_path, tradeoffs(GROUPS), console)
    shown = text_of(console)
    assert "0.9200 ± 0.0141" in shown
    assert "1.10 ± 0.283" in shown
    assert str(tmp_path / PLOT_FILE) in shown
    with Image.open(tmp_path / PLOT_FILE) as picture:
        assert picture.width > 2 * picture.height  # both axes side by side


def test_without_accuracies_there_is_a_table_and_no_plot(tmp_path: Path) -> None:
    console = text_console()
    points = tradeoffs([[job("0.7", None, 2.0, 150, plain=(None, 4.0, 100))]])
    assert all(point.optimal == () for point in points)
    show_tradeoffs(tmp_path, points, console)
    assert "needs two points" in text_of(console)
    assert list(tmp_path.iterdir()) == []


def test_a_reference_with_weights_of_its_own_is_a_line_in_the_picture(tmp_path: Path) -> None:
    groups = [[job(r, a, g, s, plain=(None, 4.0, 100))] for r, a, g, s in
              (("0.9", 0.9, 3.0, 120), ("0.7", 0.8, 2.0, 150))]  # fmt: skip
    show_tradeoffs(tmp_path, tradeoffs(groups), text_console())
    assert (tmp_path / PLOT_FILE).stat().st_size > 5000


def test_other_sweeps_have_no_tradeoffs_and_keep_their_columns() -> None:
    other = Measured(
        id="0", state="finished", exit_code=0, seed=0, swept={}, overrides=[], run_dir="",
        metrics={"knn/top1": 0.5},
    )  # fmt: skip
    assert tradeoffs([[other]]) == []
    assert tradeoffs([]) == []
    console = text_console()
    mixed = [GROUPS[0][0], other]
    console.print(jobs_table("s", mixed))
    console.print(groups_table(over_seeds([[row] for row in mixed])))
    shown = text_of(console)
    assert "knn/top1" in shown
    assert "gmacs" not in shown  # these are in the table of trade-offs
