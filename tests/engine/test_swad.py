"""SWAD: its rule on loss curves made by hand, and runs that average by it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tests.engine.compare import assert_same_bits, final
from tests.engine.inprocess import run_here, stop_after
from tests.engine.processes import execute_world, make_run, relaunch
from vlx.commands.start import Line, start
from vlx.core.errors import ConfigError
from vlx.core.results import read_results
from vlx.encoders.checkpoint import read_best, read_weights
from vlx.engine.evaluate import Outcome, run_evaluators
from vlx.engine.loop import Trainer
from vlx.engine.run import Run
from vlx.engine.swad import LossValley, RunningMean, Swad, ValleyMean
from vlx.evals.base import EvalData, Subject
from vlx.track.jsonl import read_metrics

VALLEY = [1.0, 0.7, 0.5, 0.55, 0.6, 0.52, 0.7]


def test_identical_sets_change_nothing() -> None:
    state = {"weight": torch.randn(5, 3), "steps": torch.tensor(7)}
    mean = RunningMean()
    for _ in range(9):
        mean.add(state)
    assert all(torch.equal(mean.state[name], state[name]) for name in state)
    module = nn.Linear(3, 5)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    swad = Swad(module)
    for loss in VALLEY:
        for _ in range(3):
            swad.update()
        swad.close(loss)
    with swad.swapped():
        assert all(torch.equal(v, before[name]) for name, v in module.state_dict().items())


def test_the_mean_is_that_of_all_and_leaves_its_inputs_alone() -> None:
    sets = [{"w": torch.full((2,), float(v))} for v in (1, 2, 6)]
    mean = RunningMean()
    for state in sets:
        mean.add(state)
    torch.testing.assert_close(mean.state["w"], torch.full((2,), 3.0))
    assert sets[0]["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # 0.5 is the first that two later ones do not undercut, and 1.3 * 0.55 = 0.715 the
        # threshold, below which 0.7 lies; the first of the six in sight is 1.0 then, so that what
        # is looked back at reaches to 0.55. Then the six reach 0.7, before the beginning; the end
        # takes all but the first of them.
        (VALLEY, [0, 0, 2, 2, 1, 1, 1]),
        # As above, long enough: three are looked back at, the first of those that hold left out,
        # and the beginning is counted again when it is the oldest in sight.
        ([2.0, 0.7, 0.6, 0.6, 0.5, 0.5, 0.6, 0.6, 0.6, 0.6], [0, 0, 0, 1, 2, 1, 1, 1, 1, 1]),
        # A valley from the first evaluation on: it is the oldest in sight until there are six.
        ([0.5, 0.5, 0.5, 2.0, 2.0, 2.0, 2.0, 2.0, 0.6], [3, 2, 2, 1, 1, 1, 1, 1, 1]),
        # From place 3 on six evaluations lie above 0.65: the rest is no part, low or not.
        ([0.5, 0.5, 0.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.5], [3, 2, 2, 0, 0, 0, 0, 0, 0, 0]),
        # Still falling: the newest alone.
        ([1.0, 0.9, 0.8, 0.7], [0, 0, 0, 1]),
        ([1.0, 2.0], [0, 1]),
    ],
)
def test_where_the_valley_begins_and_ends(losses: list[float], expected: list[int]) -> None:
    assert LossValley().counts(losses) == expected


class PublishedValley:
    """The authors' rule as their class goes through it, two queues and a mean that is overwritten
    by what comes first, of scalars in the place of weights."""

    def __init__(self, rule: LossValley) -> None:
        self.rule = rule
        self.recent: deque[tuple[int, float]] = deque(maxlen=rule.converge)
        self.smoothed: deque[tuple[int, float]] = deque(maxlen=rule.tolerance)
        self.begun: int | None = None
        self.dead, self.threshold = False, 0.0
        self.terms: list[int] = []
        """Segments whose mean the average is; the beginning's copy stands in for none."""

    def evaluated(self, place: int, loss: float) -> None:
        if self.dead:
            return
        self.recent.append((place, loss))
        self.smoothed.append((place, loss))
        if self.begun is None:
            if len(self.recent) == self.rule.converge:
                self._look_for_a_beginning()
        elif self.smoothed[0][0] >= self.begun:
            if min(loss for _, loss in self.smoothed) > self.threshold:
                self.dead = True
            else:
                self.terms.append(self.smoothed[0][0])

    def _look_for_a_beginning(self) -> None:
        losses = [loss for _, loss in self.recent]
        if int(np.argmin(losses)) != 0:
            return
        self.begun = self.recent[0][0]
        self.threshold = float(np.mean(losses)) * (1 + self.rule.ratio)
        surplus = self.rule.tolerance - self.rule.converge
        if surplus < 0:
            self.terms += [self.recent[1 + number][0] for number in range(-surplus)]
        elif surplus > 0:
            seen, skip = list(self.smoothed)[: surplus + 1], 0
            for number in reversed(range(len(seen))):
                if seen[number][1] > self.threshold:
                    skip = number + 1
                    break
            self.terms += [place for place, _ in seen[skip + 1 :]]

    def average(self) -> float:
        """Of the segments' numbers, if the run ended now."""
        if self.begun is None:
            return float(self.recent[-1][0])
        terms, queue = list(self.terms), list(self.smoothed)[1:]
        while not self.dead and queue:
            if min(loss for _, loss in queue) > self.threshold:
                break
            terms.append(queue.pop(0)[0])
        return sum(terms) / len(terms) if terms else float(self.begun)


RULES = [LossValley(), LossValley(1, 2), LossValley(4, 2, 0.1), LossValley(3, 3), LossValley(2, 1)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_mean_that_grows_is_the_published_one_and_keeps_few_segments(rule: LossValley) -> None:
    draw = random.Random(0)
    ends, looked_back = set(), 0
    for number in range(400):
        steps = draw.randint(1, 24)
        if number % 2:
            losses = [draw.choice([0.5, 0.6, 0.7, 0.9, 2.0]) for _ in range(steps)]
        else:  # falls, stays, rises
            losses = [0.5 + abs(k - steps / 2) / 8 + draw.random() / 4 for k in range(steps)]
        valley, published = ValleyMean(rule), PublishedValley(rule)
        for place, loss in enumerate(losses):
            valley.add({"w": torch.tensor([float(place), 1.0], dtype=torch.float64)}, loss)
            published.evaluated(place, loss)
            assert len(valley.waiting) <= max(rule.converge, rule.tolerance)
            expected = torch.tensor([published.average(), 1.0], dtype=torch.float64)
            torch.testing.assert_close(valley.mean()["w"], expected)
        ends.add(published.dead)
        start = rule.start(losses)
        looked_back += any(rule.counts(losses)[:start]) if start is not None else 0
    assert ends == {True, False}
    assert bool(looked_back) == (rule.tolerance > rule.converge + 1)


# --- runs

QUICK = (
    "eval.at_end=[knn]", "eval.compare_untrained=false", "data.workers=0", "data.val_split=all",
    "eval.every_steps=2", "train.swad=classification/loss", "train.checkpoint_every=1",
    "data.test_on_train=true",  # the losses of these runs are made by hand
)  # fmt: skip


@pytest.fixture
def made_by_hand(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of every second step of a run, to be filled."""
    losses: list[float] = []

    def evaluate(self: Run, step: int) -> dict[str, float]:
        return {"classification/loss": losses[step // 2 - 1], "classification/top1": -abs(step - 8)}

    monkeypatch.setattr(Run, "_evaluate_during", evaluate)
    return losses


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What is trained after every step of the runs that follow."""
    found: list[dict[str, Tensor]] = []
    apply = Trainer._apply

    def applied(self: Trainer, step: int) -> None:
        apply(self, step)
        own = self.method.named_parameters()
        found.append({name: p.detach().double() for name, p in own if p.requires_grad})

    monkeypatch.setattr(Trainer, "_apply", applied)
    return found


def mean_of(sets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([own[name] for own in sets]).mean(0) for name in sets[0]}


def test_a_run_averages_the_segments_of_its_valley(
    tmp_path: Path, made_by_hand: list[float], weights: list[dict[str, Tensor]]
) -> None:
    made_by_hand += VALLEY
    run_dir = make_run(
        tmp_path, "swad", *QUICK, "train.steps=15", "train.keep_best=classification/top1",
        "train.keep_last=1",
    )  # fmt: skip
    assert run_here(run_dir)[0] == 0
    # Segments 2 to 6: steps 5 to 14, the first two of them twice. The last step belongs to none.
    saved = final(run_dir)
    for name, value in mean_of(weights[4:8] + weights[4:14]).items():
        torch.testing.assert_close(saved.ema[name].double(), value, rtol=1e-5, atol=1e-7)
        assert torch.equal(saved.model[name].double(), weights[14][name])
    assert {m.weights for m in read_results(run_dir).metrics} == {"swad"}
    # Another run starts from the average, or, where it asks for it, from the best single model.
    encoder = read_weights(run_dir)
    assert all(torch.equal(encoder[name], value) for name, value in saved.ema.items())
    best = read_best(run_dir)
    assert best is not None
    assert all(torch.equal(best[name].double(), value) for name, value in weights[7].items())
    logged = [r["val/classification/loss"] for r in read_metrics(run_dir / "metrics.jsonl")
              if "val/classification/loss" in r]  # fmt: skip
    assert logged == VALLEY


def test_what_the_run_reports_is_of_the_average(
    tmp_path: Path, made_by_hand: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_by_hand += VALLEY
    seen: list[tuple[str, dict[str, Tensor]]] = []

    def state(run: Run) -> dict[str, Tensor]:
        own = run.method.named_parameters()
        return {name: p.detach().clone() for name, p in own if p.requires_grad}

    during, end = Run._evaluate_during, Run._subject

    def evaluate(self: Run, step: int) -> dict[str, float]:
        seen.append(("during", state(self)))
        return during(self, step)

    def subject(self: Run) -> Any:
        seen.append(("end", state(self)))
        return end(self)

    monkeypatch.setattr(Run, "_evaluate_during", evaluate)
    monkeypatch.setattr(Run, "_subject", subject)
    run_dir = make_run(tmp_path, "swad", *QUICK, "train.steps=14")
    run_here(run_dir)
    saved = final(run_dir)
    assert [kind for kind, _ in seen] == ["during"] * 7 + ["end"]
    # The rule reads the loss of the weights as they are, not of an average.
    assert all(torch.equal(v, saved.model[name]) for name, v in seen[6][1].items())
    assert all(torch.equal(v, saved.ema[name]) for name, v in seen[7][1].items())


def test_vlx_eval_measures_the_average(tmp_path: Path, made_by_hand: list[float]) -> None:
    made_by_hand += VALLEY
    run_dir = make_run(tmp_path, "swad", *QUICK, "train.steps=14", "optim.lr=1e-2")
    run_here(run_dir)
    (expected,) = (m.value for m in read_results(run_dir).metrics if m.name == "knn/top1")
    last = run_dir / "checkpoints" / "step-00000014" / "model.safetensors"
    found = []
    for name, weights in (("average", run_dir), ("last", last)):
        words = [
            f"runs_dir={tmp_path}", f"encoder.checkpoint={weights}", f"name={name}",
            "eval.cache_features=false", "encoder=digits", "encoder.dim=48", "encoder.depth=2",
        ]  # fmt: skip
        assert start(Line(command="eval", name="knn", overrides=words), Console(quiet=True)) == 0
        found.append(read_results(tmp_path / name).value("knn/top1"))
    assert found[0] == expected != found[1]


@pytest.mark.parametrize("step", [1, 4, 9, 13])
def test_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, made_by_hand: list[float], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before the first evaluation, at one, within a segment, and with decided segments."""
    # The valley of steps 1 to 6 ends where six losses lie above it.
    made_by_hand += [0.5, 0.6, 0.5, 0.5, 3.0, 0.6, 0.5]
    whole = make_run(tmp_path, "whole", *QUICK, "train.steps=14")
    run_here(whole)
    run_dir = make_run(tmp_path, "stopped", *QUICK, "train.steps=14")
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert run_here(run_dir)[0] == 75
    run_here(run_dir)
    assert_same_bits(run_dir, whole)
    assert final(whole).swad["counts"].tolist() == [0, 3]  # a beginning that came first
    assert any(name.startswith("inside/") for name in final(whole).swad)


# --- with real validation

GLYPHS = (
    "train.steps=6", "eval.every_steps=2", "data.balance_domains=true", "train.batch_size=12",
    "data.train_split=train:DejaVuSans+DejaVuSerif:train", "train.swad=classification/loss",
    "data.val_split=train:DejaVuSans+DejaVuSerif:test", "train.keep_best=classification/top1",
    "eval.at_end=[classification]", "eval.compare_untrained=false", "data.workers=0",
    "optim.lr=1e-4",
)  # fmt: skip


def scores(run_dir: Path) -> Iterator[tuple[str, float, int]]:
    for metric in read_results(run_dir).metrics:
        yield metric.name, metric.value, metric.num_samples


def test_vl2v_adip_runs_its_two_stages_as_the_paper_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float]] = []

    def evaluate(names: list[str], subject: Subject, data: EvalData, **keys: Any) -> Outcome:
        outcome = run_evaluators(names, subject, data, **keys)
        seen.append((outcome.metrics[0].split, outcome.metrics[0].num_samples))
        return outcome

    monkeypatch.setattr("vlx.engine.run.run_evaluators", evaluate)
    aligned = make_run(tmp_path, "aligned", *GLYPHS, slug="vl2v-adip")
    assert run_here(aligned)[0] == 0
    records = read_metrics(aligned / "metrics.jsonl")
    losses = [r["val/classification/loss"] for r in records if "val/classification/loss" in r]
    assert final(aligned).swad["losses"].tolist() == losses
    assert len(losses) == 3
    held_out = seen[0]
    assert held_out[0] == "glyphs/train:DejaVuSans+DejaVuSerif:test"
    assert seen[:3] == [held_out] * 3
    assert [split for split, _ in seen[3:]] == ["glyphs/test"]
    best = read_best(aligned)
    assert best is not None
    words = ("method.stage=distil", f"method.projection={aligned}")
    distilled = make_run(tmp_path, "distilled", *GLYPHS, *words, slug="vl2v-adip")
    assert run_here(distilled)[0] == 0
    own = final(distilled)
    for name in ("projection.weight", "projection.bias"):
        assert torch.equal(own.model[name], best[name])
        assert not torch.equal(final(aligned).ema[name], best[name])
    assert any(name.startswith("student.") for name in own.ema)


@pytest.mark.slow
def test_two_processes_average_like_one(tmp_path: Path) -> None:
    runs = []
    for world in (1, 2):
        words = (*GLYPHS, "launcher=torchrun", "method.stage=joint")
        run_dir = make_run(tmp_path, f"world{world}", *words, slug="vl2v-adip")
        relaunch(run_dir, launcher__processes=world)
        execute_world(run_dir, world)
        runs.append(run_dir)
    one, two = (final(run_dir) for run_dir in runs)
    torch.testing.assert_close(two.swad["losses"], one.swad["losses"], rtol=1e-5, atol=0)
    for name, value in one.ema.items():
        torch.testing.assert_close(two.ema[name], value, rtol=1e-3, atol=1e-5)
    for (name, a, n), (_, b, m) in zip(*map(scores, runs)):
        assert n == m
        assert a == pytest.approx(b, abs=2 / n), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.val_split=null",), r"set e\.g\. data\.train_split=train:train data\.val_split"),
        (("data.val_split=test",), r"data\.val_split=test is the test split"),
        (("eval.every_steps=0",), r"set eval\.every_steps"),
        (("launcher.strategy=fsdp",), r"launcher\.strategy=ddp"),
        (("train.ema_decay=0.9",), r"train\.swad and train\.ema_decay both"),
    ],
)
def test_what_swad_cannot_run_with_is_said_before_the_run(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run(tmp_path, "refused", *QUICK, *words)


def test_no_evaluation_and_an_unknown_loss_are_refused(
    tmp_path: Path, made_by_hand: list[float]
) -> None:
    made_by_hand += VALLEY
    with pytest.raises(ConfigError, match="no evaluation within 1 steps"):
        run_here(make_run(tmp_path, "short", *QUICK, "train.steps=1"))
    words = ("train.swad=classification/los", "train.steps=2")
    with pytest.raises(ConfigError, match=r"train\.swad=classification/los: .*classification/loss"):
        run_here(make_run(tmp_path, "typo", *QUICK, *words))
