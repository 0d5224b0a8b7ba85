"""`vlx prune-tokens`: the line of the README, its numbers, its sweep, and what it refuses."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.commands.conftest import text_console, text_of
from tests.data.make import encode
from vlx import cli
from vlx.commands import sweep as sweep_module
from vlx.commands.runs import list_runs
from vlx.commands.start import Line, over_rates, root_of, start
from vlx.commands.sweep_file import read_jobs
from vlx.commands.tables import figure
from vlx.core.errors import ConfigError, DataError
from vlx.core.results import read_results
from vlx.data.config import DataConfig
from vlx.data.open import open_source

SMALL = ("track=none", "train.steps=1", "eval.speed_batches=[2]", "data.workers=0")


def line(method: str, *overrides: str, **words: object) -> Line:
    return Line(
        command="prune-tokens", name=method, preset="smoke", overrides=[*SMALL, *overrides],
        **words,  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_timm_model_at_a_keep_rate_from_one_line(here: Path) -> None:
    console = text_console()
    words = ("encoder=vit_tiny_patch16_224", "encoder.image_size=64", "keep_rate=0.7", "name=r")
    assert start(line("evit", *words), console) == 0
    results = read_results(here / "runs" / "r")
    # 16 patches and a class token, less in layers 3, 6 and 9: ceil(0.7 n) and a fused token
    assert results.counts["tokens/tokens-in-mlp"] == [17] * 3 + [14] * 3 + [12] * 3 + [10] * 3
    shown = text_of(console)
    assert "tokens in mlp: 17 x 3, 14 x 3, 12 x 3, 10 x 3" in shown
    assert "GMACs/image" in shown
    untrained = {m.name for m in results.metrics if m.weights == "untrained"}
    assert untrained == {"tokens/top1/plain", "tokens/top1/reduced"}
    listed = text_console()
    list_runs(here / "runs", as_json=False, console=listed, errors=listed)
    gmacs = results.value("tokens/gmacs/reduced")
    assert gmacs is not None
    accuracy = results.value("tokens/top1/reduced")
    assert f"reduced top1 {accuracy:.4f}, {figure(gmacs, 'GMACs')} GMACs" in text_of(listed)


def test_the_line_of_the_issue_is_a_plan_for_vit_small(here: Path) -> None:
    console = text_console()
    words = ["encoder=vit_small_patch16_224", "keep_rate=0.7"]
    plan = Line(
        command="prune-tokens", name="evit", preset="paper", overrides=words, dry_run=True
    )  # fmt: skip
    assert start(plan, console) == 0
    shown = text_of(console)
    assert "3.029 of one image, tokens reduced" in shown  # table 1 of the paper: 3.0
    assert "197 x 3, 140 x 3, 100 x 3, 72 x 3" in shown
    assert list(here.iterdir()) == []


# --sweep


def test_the_rates_are_the_papers_unless_the_line_has_its_own() -> None:
    own = line("evit", sweep=True)
    rates = over_rates(own, root_of(own))
    assert rates.multirun
    assert rates.overrides[0] == "method.keep_rate=0.9,0.8,0.7,0.6,0.5"
    mine = line("evit", "keep_rate=0.9,0.6", "seed=0,1", sweep=True)
    assert over_rates(mine, root_of(mine)).overrides == mine.overrides


def test_a_sweep_lists_the_papers_rates(here: Path) -> None:
    console = text_console()
    assert start(line("tome", sweep=True, dry_run=True), console) == 0
    jobs = [text.split(":")[0] for text in text_of(console).splitlines()]
    assert jobs == ["000-r_16", "001-r_13", "002-r_8", "003-r_4", "004-r_0"]


STAND_IN = """
import pathlib, sys, yaml
from vlx.core.results import Metric, Results
from vlx.engine.rundir import locked, read_record
run = pathlib.Path(sys.argv[1])
record = read_record(run)
config = yaml.safe_load((run / "config.yaml").read_text())
rate, seed = config["method"]["keep_rate"], config["seed"]
values = {
    "top1": (0.9 + 0.01 * seed, 0.9 * rate + 0.01 * seed), "gmacs": (4.0, 4.0 * rate),
    "images-per-s-batch8": (100.0, 90.0 / rate), "peak-memory": (8.0, 6.0),
}
metrics = [
    Metric(name=f"tokens/{what}/{kind}", value=value, unit="", split="s", num_samples=1,
           protocol="tokens@1", weights="trained")
    for what, pair in values.items() for kind, value in zip(("plain", "reduced"), pair)
]
with locked(run):
    Results(run=run.name, command="", method="", preset="", seed=seed, config_hash="",
            data_fingerprint="", weights_checksum="", steps=1, epochs=1, final_losses={},
            metrics=metrics, bad_samples=0, hardware={}, versions={}, commit="", wall_time_s=0,
            peak_memory_mb=0, finished="").write(run)
    record.state = "finished"; record.write(run)
"""


def test_a_sweep_ends_in_a_pareto_table_and_a_picture(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the jobs' processes."""
    command = [sys.executable, "-c", STAND_IN]
    monkeypatch.setattr(sweep_module, "job_command", lambda run_dir: [*command, str(run_dir)])
    console = text_console()
    words = ("keep_rate=0.5,0.9", "seed=0,1", "name=s")
    assert start(line("evit", *words, sweep=True, jobs=2), console) == 0
    folder = here / "runs" / "sweeps" / "s"
    assert [job.swept["method.keep_rate"] for job in read_jobs(folder)] == ["0.5"] * 2 + ["0.9"] * 2
    points = json.loads((folder / "sweep.json").read_text())["pareto"]
    assert [point["setting"] for point in points] == [
        {"method.keep_rate": "0.5"}, {"method.keep_rate": "0.9"}, {},
    ]  # fmt: skip
    assert points[0]["top1"]["mean"] == pytest.approx(0.455)
    assert points[0]["speedup"]["mean"] == pytest.approx(1.8)
    assert points[0]["top1"]["n"] == 2
    assert (folder / "pareto.png").stat().st_size > 5000
    shown = text_of(console)
    for word in ("keep_rate 0.5", "0.4550 ± 0.00707", "plain", "Pareto", "┤"):
        assert word in shown, word


# Mistakes that only building the model shows: told in one line, before anything is written. Those
# of the configuration alone are in tests/config/test_errors.py.

REFUSED = [
    (["encoder=resnet18"], ["ResNet is not a plain ViT", "encoder=deit_small_patch16_224"]),
    (["encoder=swin_tiny_patch4_window7_224"], ["SwinTransformer is not a plain ViT"]),
    (["encoder.name=resnet18"], ["encoder.name=resnet18 does not take", "'embed_dim': 64"]),
    (["reduction_layers=[3,12]"], ["method.reduction_layers=[3, 12]", "6 layers, 0 to 5"]),
    (["encoder=vit_tiny_patch16_224", "reduction_layers=[12]"], ["12 layers, 0 to 11"]),
    (["encoder=vit_tiny_patch16_224", "encoder.image_size=100"], ["encoder.image_size=100"]),
    (["encoder.name=vit_tinny_patch16_224"], ["vit_tiny_patch16_224"]),
    (["--sweep", "encoder=resnet18"], ["job method.keep_rate=0.9: ResNet is not a plain ViT"]),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda value: " ".join(value))
def test_a_model_that_cannot_be_is_refused_in_one_line(
    words: list[str], said: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vlx", "prune-tokens", "evit", "track=none", *words])
    monkeypatch.setattr(cli.errors, "file", io.StringIO())
    monkeypatch.setattr(logging.getLogger("vlx"), "handlers", [])  # main adds one
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    text = cli.errors.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    for word in said:
        assert word in text
    assert list(here.iterdir()) == []


def test_a_plan_that_leaves_no_patch_is_refused() -> None:
    from vlx.blocks.vit_block import LayerTokens, TokenReducer
    from vlx.encoders.base import EncoderSpec
    from vlx.families.token_reduction import check_plan

    class Empties(TokenReducer):
        def plan(self, num_patches: int, num_prefix: int, depth: int) -> list[LayerTokens]:
            return [LayerTokens(17, 17), LayerTokens(17, 1)]

    spec = EncoderSpec(
        dim=8, depth=2, heads=2, patch_size=2, image_size=8, num_prefix=1, class_token=True,
        mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="Empties leaves no patch token in layer 1 of 2"):
        check_plan(Empties(), spec)


def test_a_runs_classifier_is_evaluated_with_its_own_head(here: Path) -> None:
    assert start(line("evit", "name=r", "eval.at_end=[classification]"), text_console()) == 0
    trained = read_results(here / "runs" / "r").value("classification/top1")
    for name in ("classification", "tokens"):
        words = ["encoder.checkpoint=runs/r", f"name={name}", "eval.speed_batches=[2]"]
        assert start(Line(command="eval", name=name, overrides=words), text_console()) == 0
    assert read_results(here / "runs/classification").value("classification/top1") == trained
    assert read_results(here / "runs/tokens").value("tokens/top1/reduced") == trained


def _digits_as_words(root: Path, names: Sequence[str]) -> str:
    """The digits as a tree of files, whose classes sort in another order than 0..9."""
    for split in ("train", "test"):
        source = open_source(DataConfig(), split)
        for index in range(len(source)):
            sample = source.read(index)
            folder = root / split / names[sample["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:04d}.png").write_bytes(encode(sample["image"]))
    return str(root)


_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _named(here: Path) -> tuple[str, str]:
    """Words of a run whose classes have these names, in this order."""
    (here / "names.txt").write_text("\n".join(_NAMES))
    return "eval.at_end=[classification]", f"data.class_names={here / 'names.txt'}"


def _assert_same_figures(here: Path, *names: str) -> None:
    first, second = (read_results(here / "runs" / name) for name in names)
    for metric in ("classification/top1", "classification/loss"):
        value = first.value(metric)
        assert value is not None
        # Batches are cut in another order, which float sums show.
        assert second.value(metric) == pytest.approx(value, abs=1e-6)


def _assert_another_class_is_refused(here: Path, of_the_tree: Line) -> None:
    for split in ("train", "test"):
        shutil.move(here / "tree" / split / "nine", here / "tree" / split / "minus one")
    with pytest.raises(DataError, match=r"other classes than the run .*missing nine; new minus on"):
        start(of_the_tree, text_console())


def test_a_runs_head_is_matched_with_the_classes_by_name(here: Path) -> None:
    """The same pictures in another order of classes give the same accuracy, not that of chance."""
    assert start(line("evit", "name=r", "train.steps=8", *_named(here)), text_console()) == 0
    # The folders have names of their own: the run's file of names says nothing of them.
    tree = ("data.source=folder", f"data.path={_digits_as_words(here / 'tree', _NAMES)}")
    words = [f"encoder.checkpoint={here / 'runs' / 'r'}", "name=c", *tree]
    assert start(Line(command="eval", name="classification", overrides=words), text_console()) == 0
    _assert_same_figures(here, "r", "c")
    words[1] = "name=d"
    again = Line(command="eval", name="classification", overrides=words)
    _assert_another_class_is_refused(here, again)


def test_a_pruned_classifier_has_its_classes_by_name(here: Path) -> None:
    """A trained head on the same pictures as a tree of files, whose classes sort otherwise."""
    training = Line(
        command="finetune", name="supervised", preset="smoke",
        overrides=["track=none", "train.steps=30", "data.workers=0", "name=r", *_named(here)],
    )  # fmt: skip
    assert start(training, text_console()) == 0
    tree = ("data=folder", f"data.path={_digits_as_words(here / 'tree', _NAMES)}", "data.workers=0")
    pruned = ["encoder.checkpoint=runs/r", "eval.at_end=[classification]", "train.steps=0", *tree]
    # Every patch kept: the reduced model is the one that was trained.
    assert start(line("tome", *pruned, "method.r=0", "name=p"), text_console()) == 0
    _assert_same_figures(here, "r", "p")
    _assert_another_class_is_refused(here, line("tome", *pruned, "name=q"))
