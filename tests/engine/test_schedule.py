"""Schedules against timm's, torch's and published formulas; recipes against logged rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn
from torch.optim import lr_scheduler

from tests.contract.build import config
from vlx.core.errors import ConfigError
from vlx.core.method import ParamGroup
from vlx.engine.config import OptimConfig, Optimizer, Per, Schedule, ScheduleConfig, Warmup
from vlx.engine.optim import build_optimizer, peak_lr
from vlx.engine.schedule import Rates

STEPS, EPOCH = 100, 10


def rates(total: int = STEPS, decay: float = 0.05, **keys: Any) -> Rates:
    return Rates(ScheduleConfig(**keys), 1.0, decay, total, EPOCH)


def one_weight(lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def stepped(optimizer: torch.optim.Optimizer, scheduler: Any, count: int = STEPS) -> list[float]:
    """Rates of `count` updates under a scheduler of torch that moves after each."""
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


# Against the libraries


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("warmup", [0, 7, 20])
@pytest.mark.parametrize("min_lr", [0.0, 0.1])
def test_cosine_equals_timms(warmup: int, min_lr: float, prefix: bool) -> None:
    optimizer = one_weight()
    timm = CosineLRScheduler(
        optimizer, t_initial=STEPS - warmup * prefix, lr_min=min_lr, warmup_t=warmup,
        warmup_lr_init=0.01, warmup_prefix=prefix, t_in_epochs=False,
    )  # fmt: skip
    ours = rates(warmup_steps=warmup, warmup_lr=0.01, min_lr=min_lr, warmup_prefix=prefix)
    for step in range(STEPS):
        timm.step_update(step)
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step


@pytest.mark.parametrize("late", [0, 1])
def test_rates_by_epoch_are_timms_of_that_epoch(late: int) -> None:
    """timm's training script calls `step(epoch + 1)` after an epoch, DeiT's `step(epoch)`."""
    optimizer = one_weight()
    timm = CosineLRScheduler(
        optimizer, t_initial=10, lr_min=0.1, warmup_t=3, warmup_lr_init=0.01, warmup_prefix=False
    )
    ours = rates(
        per=Per.epoch, late_epochs=late, warmup_epochs=3, warmup_lr=0.01, min_lr=0.1,
        warmup_prefix=False,
    )  # fmt: skip
    for epoch in range(10):
        for step in range(epoch * EPOCH, (epoch + 1) * EPOCH):
            assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step
        timm.step(epoch + 1 - late)


@pytest.mark.parametrize("momentum", [[0.85, 0.95], []])
@pytest.mark.parametrize("total", [10, STEPS, 1000])
def test_one_cycle_equals_torchs(total: int, momentum: list[float]) -> None:
    """With Adam's first beta, which torch cycles too unless told not to."""
    twin = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = lr_scheduler.OneCycleLR(
        twin, max_lr=1.0, total_steps=total, cycle_momentum=bool(momentum)
    )
    weight = nn.Parameter(torch.zeros(1, 1))
    own = build_optimizer(
        OptimConfig(lr=1.0, betas=[0.9, 0.999]), [ParamGroup("w", [("w", weight)])], 1.0
    )
    ours = rates(total, name=Schedule.one_cycle, cycle_momentum=momentum)
    for step in range(total):
        ours.apply(own, step)
        for key in ("lr", "betas"):
            expected = twin.param_groups[0][key]
            assert own.param_groups[0][key] == pytest.approx(expected, abs=1e-9), (step, key)
        twin.step()
        if step < total - 1:
            torchs.step()


def test_one_cycle_moves_the_momentum_of_sgd() -> None:
    twin = one_weight()
    torchs = lr_scheduler.OneCycleLR(twin, max_lr=1.0, total_steps=STEPS)
    own = build_optimizer(
        OptimConfig(name=Optimizer.sgd),
        [ParamGroup("w", [("w", nn.Parameter(torch.ones(1, 1)))])],
        1.0,
    )
    ours = rates(name=Schedule.one_cycle)
    for step in range(STEPS - 1):
        ours.apply(own, step)
        expected = twin.param_groups[0]["momentum"]
        assert own.param_groups[0]["momentum"] == pytest.approx(expected, abs=1e-9)
        twin.step()
        torchs.step()


TORCHS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "cosine": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.1),
        {"name": Schedule.cosine, "min_lr": 0.1},
    ),
    "cosine past the run": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, 2 * STEPS),
        {"name": Schedule.cosine, "curve_share": 2.0},
    ),
    "polynomial": (
        lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=0.9),
        {"name": Schedule.polynomial},
    ),
    "polynomial, shorter than the run": (
        lambda o: lr_scheduler.PolynomialLR(o, 60, power=2.0),
        {"name": Schedule.polynomial, "power": 2.0, "curve_steps": 60},
    ),
    "linear": (
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, STEPS),
        {"name": Schedule.linear, "min_lr": 0.1},
    ),
    "steps": (
        lambda o: lr_scheduler.MultiStepLR(o, [7, 29, 57], gamma=0.5),
        {"name": Schedule.step, "milestones": [0.07, 0.29, 0.57], "gamma": 0.5},
    ),
    "equal steps": (
        lambda o: lr_scheduler.StepLR(o, 3 * EPOCH, gamma=0.5),
        {"name": Schedule.step, "gamma_epochs": 3, "gamma": 0.5},
    ),
    "exponential": (
        lambda o: lr_scheduler.ExponentialLR(o, 0.97),
        {"name": Schedule.exponential, "gamma": 0.97, "gamma_epochs": 1 / EPOCH},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TORCHS)
def test_curves_equal_torchs(case: str) -> None:
    make, keys = TORCHS[case]
    optimizer = one_weight()
    expected = stepped(optimizer, make(optimizer))
    found = [rates(**keys).lr(step) for step in range(STEPS)]
    assert found == pytest.approx(expected, abs=1e-9)


def test_exponential_by_epochs_falls_by_gamma_an_epoch_down_to_the_least_rate() -> None:
    ours = rates(name=Schedule.exponential, per=Per.epoch, gamma=0.5, min_lr=0.2)
    assert [ours.lr(s) for s in (0, 9, 10, 19, 20, 30, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.2, 0.2]


# Against published formulas


def test_cosine_equals_the_formula_of_maes_code() -> None:
    """lr_sched.py: half-cycle cosine after a linear warm-up, by fractional epochs."""
    ours = rates(warmup_epochs=2.0, min_lr=0.01)
    for step in range(STEPS):
        epoch = step / EPOCH
        if epoch < 2:
            expected = epoch / 2
        else:
            expected = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (epoch - 2) / (10 - 2)))
        assert ours.lr(step) == pytest.approx(expected, abs=1e-12)


def test_a_curve_longer_than_the_run_is_cut_off_by_its_end() -> None:
    """CroCo: 800 epochs laid out, with 40 of warm-up, and stopped after 400."""
    ours = Rates(ScheduleConfig(warmup_epochs=40, curve_epochs=760), 1.0, 0.0, 4000, EPOCH)
    longer = Rates(ScheduleConfig(warmup_epochs=40), 1.0, 0.0, 8000, EPOCH)
    assert [ours.lr(s) for s in range(4000)] == [longer.lr(s) for s in range(4000)]
    assert ours.lr(3999) > 0.5


def test_after_a_shorter_curve_the_last_rate_stays() -> None:
    ours = rates(curve_steps=40, min_lr=0.1)
    assert [ours.lr(s) for s in (40, 70, 99)] == pytest.approx([0.1, 0.1, 0.1])


def test_warmup_starts_where_it_is_told() -> None:
    ours = rates(warmup_steps=10, warmup_lr=0.2)
    assert [ours.lr(s) for s in (0, 5)] == pytest.approx([0.2, 0.6])
    assert ours.lr(10) == 1.0


def test_wsd_is_stable_then_falls_linearly() -> None:
    ours = rates(name=Schedule.wsd, warmup_steps=10, decay_share=0.2, min_lr=0.1)
    assert [ours.lr(s) for s in (5, 10, 79, 80, 90)] == pytest.approx([0.5, 1, 1, 1, 0.55])
    assert ours.lr(99) == pytest.approx(0.1 + 0.9 * 0.05)


def test_wsd_does_not_decay_during_warm_up() -> None:
    """The whole run spent decaying is DeepSpeed's WarmupDecayLR: (T - t) / (T - w) after w."""
    ours = rates(name=Schedule.wsd, warmup_steps=20, decay_share=1.0)
    assert [ours.lr(s) for s in (10, 20, 60, 99)] == pytest.approx([0.5, 1.0, 0.5, 1 / 80])


def test_constant_schedule() -> None:
    ours = rates(name=Schedule.constant, warmup_steps=2)
    assert [ours.lr(s) for s in (0, 1, 2, 99)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("name", list(Schedule), ids=lambda s: s.name)
def test_per_epoch_moves_at_epochs_alone(name: Schedule) -> None:
    warmup = 0.0 if name is Schedule.one_cycle else 2.0
    by_epoch = rates(name=name, per=Per.epoch, warmup_epochs=warmup, weight_decay_end=0.5)
    by_step = rates(name=name, warmup_epochs=warmup, weight_decay_end=0.5)
    for step in range(STEPS):
        first = step // EPOCH * EPOCH
        assert by_epoch.lr(step) == by_step.lr(first)
        assert by_epoch.decay(step) == by_step.decay(first)


def test_weight_decay_moves_by_a_half_cosine() -> None:
    ours = rates(decay=0.04, weight_decay_end=0.4)
    assert [ours.decay(s) for s in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert rates(decay=0.04).decay(70) == 0.04


# Groups


def groups_of(*groups: dict[str, Any]) -> torch.optim.Optimizer:
    made = [
        ParamGroup(str(i), [(str(i), nn.Parameter(torch.zeros(2, 2)))], **keys)
        for i, keys in enumerate(groups)
    ]
    return build_optimizer(OptimConfig(lr=1.0, weight_decay=0.3), made, 1.0)


def test_applied_rates_respect_scales_and_own_decay() -> None:
    optimizer = groups_of({"lr_scale": 0.5}, {"weight_decay": 0.0})
    rates(warmup_steps=10, decay=0.3).apply(optimizer, 5)
    found = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(0.25, 0.3), (0.5, 0.0)]


def test_a_groups_own_weight_decay_has_its_own_schedule() -> None:
    """The run's moves from 0.3 to 0.9, one group's stays, another's falls from 0.2 to 0."""
    optimizer = groups_of(
        {}, {"weight_decay": 0.2}, {"weight_decay": 0.2, "schedule": {"weight_decay_end": 0.0}}
    )
    rates(decay=0.3, weight_decay_end=0.9).apply(optimizer, 50)
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.6, 0.2, 0.1])


def test_a_groups_own_rate_has_its_own_schedule() -> None:
    optimizer = groups_of(
        {}, {"schedule": {"name": "constant", "warmup_steps": 0}, "lr_scale": 0.1}
    )
    ours = rates(warmup_steps=10)
    for step, expected in ((5, [0.5, 0.1]), (55, [0.5, 0.1])):
        ours.apply(optimizer, step)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"nmae": "constant"}, "schedule.nmae.*name"), ({"name": "cosin"}, "name=cosin.*cosine")],
)
def test_a_groups_unknown_schedule_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rates().apply(groups_of({"schedule": keys}), 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"curve_steps": 5, "curve_share": 1.0}, "curve_steps and schedule.curve_share"),
        ({"every_epochs": 0}, "every_epochs must be above 0"),
        ({"curve_epochs": 0.0}, "curve_epochs must be above 0"),
        ({"decay_share": 0.0}, "decay_share must lie in 0..1"),
        ({"name": Schedule.one_cycle, "warmup_steps": 5}, "rises by itself"),
        ({"cycle_momentum": [0.9]}, "two numbers"),
    ],
)
def test_schedules_that_contradict_themselves_are_refused(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**keys)


# Recipes against what was logged or published

SPE = 40


def of_recipe(slug: str, preset: str = "paper", *, peak: float | None = None) -> Callable:
    """Rate at the beginning of an epoch (or a fraction of it) under a preset, 40 steps an epoch."""
    cfg = config(slug, preset)
    top = peak_lr(cfg.optim, cfg.train.batch_size) if peak is None else peak
    epochs = cfg.train.epochs or 300  # methods that train nothing carry DeiT's schedule
    total = round(epochs * SPE)
    found = Rates(cfg.schedule, top, cfg.optim.weight_decay, total, SPE)
    return lambda epoch: found.lr(math.floor(epoch * SPE + 1e-6))


def test_stvit_r_has_the_rates_of_its_log() -> None:
    lr = of_recipe("stvit", "swin-small")
    assert lr(0) == pytest.approx(1e-6)
    logged = {100: 7.53e-4, 150: 505e-6, 200: 2.58e-4}
    for epoch, rate in logged.items():
        assert lr(epoch) == pytest.approx(rate, abs=5e-7), epoch
    assert lr(150.5) < lr(150)  # every step


def test_rmt_has_the_rates_of_its_logs() -> None:
    """One epoch late; peak 2.0e-3 at batch 2048, as in all seven logs."""
    lr = of_recipe("rmt", peak=2e-3)
    assert lr(0) == lr(1) == pytest.approx(1e-6)
    assert max(range(300), key=lr) == 6
    assert round(lr(6), 4) == 2.0e-3
    for epoch in range(6, 300):
        expected = 1e-5 + 9.95e-4 * (1 + math.cos(math.pi * (epoch - 1) / 300))
        assert lr(epoch) == lr(epoch + 0.9) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("slug", "late"),
    [("supervised", 1), ("evit", 1), ("svit", 1), ("stvit", 1), ("lookupvit", 1), ("tome", 1),
     ("expedite", 1), ("cvt", 0)],
)  # fmt: skip
def test_deit_and_its_kin_move_once_an_epoch_under_a_warm_up_laid_over(
    slug: str, late: int
) -> None:
    lr = of_recipe(slug, peak=1e-3)
    for epoch in range(300):
        t = max(0, epoch - late)
        cosine = 1e-5 + 0.5 * 9.9e-4 * (1 + math.cos(math.pi * t / 300))
        expected = 1e-6 + t * (1e-3 - 1e-6) / 5 if t < 5 else cosine
        assert lr(epoch) == lr(epoch + 0.99) == pytest.approx(expected), epoch


@pytest.mark.parametrize(("slug", "peak"), [("coop", 2e-3), ("maple", 3.5e-3), ("pre", 2e-3)])
def test_dassls_constant_epoch_stands_before_a_cosine_of_all_epochs(slug: str, peak: float) -> None:
    epochs = int(config(slug, "paper").train.epochs or 0)
    lr = of_recipe(slug)
    assert lr(0) == lr(0.9) == 1e-5
    for epoch in range(1, epochs):
        expected = peak * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
        assert lr(epoch) == lr(epoch + 0.9) == pytest.approx(expected)


def test_maples_rates_are_those_of_its_card() -> None:
    lr = of_recipe("maple")
    published = [1e-5, 0.0035, 0.00317, 0.00229, 0.00121]
    assert [lr(e) for e in range(5)] == pytest.approx(published, abs=6e-6)


@pytest.mark.parametrize(("slug", "peak"), [("albef", 1e-4), ("unimodal-projectors", 1e-3)])
def test_albefs_warm_up_moves_by_hundred_steps_and_its_cosine_by_epochs(
    slug: str, peak: float
) -> None:
    cfg = config(slug, "paper")
    warmup, epochs = cfg.schedule.warmup_steps, int(cfg.train.epochs or 0)
    assert warmup is not None
    ours = Rates(cfg.schedule, peak_lr(cfg.optim, cfg.train.batch_size), 0.0, epochs * 8000, 8000)
    for step in range(0, warmup, 50):
        expected = 1e-5 + (step // 100) * (peak - 1e-5) / (warmup / 100)
        assert ours.lr(step) == pytest.approx(expected)
    assert ours.lr(warmup) == ours.lr(7999) == peak
    for epoch in range(1, epochs):
        expected = 1e-5 + (peak - 1e-5) / 2 * (1 + math.cos(math.pi * epoch / epochs))
        assert ours.lr(epoch * 8000) == ours.lr(epoch * 8000 + 7999) == pytest.approx(expected)
    if slug == "albef":
        assert ours.lr(29 * 8000) == pytest.approx(1.02e-5, abs=5e-8)


def test_albefs_retrieval_moves_once_in_an_epoch_of_pairs() -> None:
    """Five rates over the run, as the official Retrieval_coco.yaml and its loop give them; an epoch
    of pairs is five of images."""
    cfg = config("albef", "retrieval")
    assert cfg.train.epochs == 25
    ours = Rates(cfg.schedule, peak_lr(cfg.optim, cfg.train.batch_size), 0.02, 25 * SPE, SPE)
    pairs = 5 * SPE
    for epoch in range(5):
        expected = 1e-6 + (1e-5 - 1e-6) / 2 * (1 + math.cos(math.pi * epoch / 5))
        found = {ours.lr(step) for step in range(epoch * pairs, (epoch + 1) * pairs)}
        assert len(found) == 1
        assert found.pop() == pytest.approx(expected)
    # Flickr30k: ten epochs of pairs, train.epochs=50.
    flickr = replace(ours, total_steps=50 * SPE)
    assert len({flickr.lr(step) for step in range(50 * SPE)}) == 10
    assert flickr.lr(9 * pairs) == pytest.approx(1e-6 + 4.5e-6 * (1 + math.cos(0.9 * math.pi)))


def test_limber_warms_up_by_logarithms_and_falls_linearly() -> None:
    """DeepSpeed's WarmupDecayLR with its defaults: 0.66 of the peak at step 20."""
    cfg = config("limber", "paper")
    ours = Rates(cfg.schedule, 1.0, 0.0, 15000, 1000)
    assert cfg.schedule.warmup is Warmup.log
    assert [ours.lr(s) for s in (0, 20, 99)] == pytest.approx([0, 0.66, 1.0], abs=2e-3)
    assert [ours.lr(s) for s in (100, 7550, 15000)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("slug", "warmup", "epochs", "peak", "low", "end"),
    [
        ("mae", 40, 1600, 2.4e-3, 0.0, 0.0),
        ("cropmae", 20, 400, 8e-4, 0.0, 0.0),
        ("channelvit", 10, 100, 5e-4, 0.0, 1e-6),
        ("gmml", 10, 801, 5e-4, 0.0, 1e-6),
    ],
)
def test_maes_kin_begin_their_cosine_after_warm_up(
    slug: str, warmup: int, epochs: int, peak: float, low: float, end: float
) -> None:
    lr = of_recipe(slug)
    for epoch in (0.5, warmup / 2, warmup - 0.5):
        assert lr(epoch) == pytest.approx(low + (peak - low) * epoch / warmup)
    for epoch in (warmup, warmup + 0.5, epochs / 2, epochs - 1):
        share = (epoch - warmup) / (epochs - warmup)
        assert lr(epoch) == pytest.approx(end + (peak - end) / 2 * (1 + math.cos(math.pi * share)))
