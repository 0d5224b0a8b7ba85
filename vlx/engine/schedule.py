"""Learning rates, weight decays and momenta: pure functions of the step, so nothing is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from vlx.core.errors import ConfigError, nearest
from vlx.engine.config import Per, Schedule, ScheduleConfig, Warmup


@dataclass(frozen=True)
class Rates:
    """Learning rate, weight decay and momentum at any step."""

    schedule: ScheduleConfig
    peak: float
    weight_decay: float
    total_steps: int
    steps_per_epoch: int

    @property
    def warmup_steps(self) -> int:
        if self.schedule.warmup_steps is not None:
            return self.schedule.warmup_steps
        return round(self.schedule.warmup_epochs * self.steps_per_epoch)

    @property
    def curve(self) -> tuple[int, float]:
        """First step and length in steps of the curve, which may reach past the run."""
        cfg = self.schedule
        start = self.warmup_steps if cfg.warmup_prefix else 0
        if cfg.curve_epochs is not None:
            return start, cfg.curve_epochs * self.steps_per_epoch
        if cfg.curve_steps is not None:
            return start, cfg.curve_steps
        if cfg.curve_share is not None:
            return start, cfg.curve_share * self.total_steps
        return start, self.total_steps - start

    def lr(self, step: int) -> float:
        """For the update number `step` (from 0), before any per-group scale."""
        every = self.schedule.warmup_every
        if every is not None and step < self.warmup_steps:
            return self._warming(step - step % every)
        position = self._position(step)
        if every is None and position < self.warmup_steps:
            return self._warming(position)
        return self._curve(position)

    def decay(self, step: int) -> float:
        """Weight decay at `step`, for groups that do not carry their own."""
        end = self.schedule.weight_decay_end
        if end is None:
            return self.weight_decay
        done = self._position(step) / max(1, self.total_steps)
        return _between(self.weight_decay, end, _half_cosine(done))

    def momentum(self, step: int) -> float | None:
        """Momentum, or Adam's first beta, at `step`; None where the schedule leaves it alone."""
        if self.schedule.name is not Schedule.one_cycle or not self.schedule.cycle_momentum:
            return None
        low, high = self.schedule.cycle_momentum
        rising, share = self._cycle(self._position(step))
        return _between(high, low, share) if rising else _between(low, high, share)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the step's rates into the optimizer's groups."""
        for group in optimizer.param_groups:
            rates = self._of_group(group["own_decay"], group["schedule"])
            group["lr"] = rates.lr(step) * group["lr_scale"]
            group["weight_decay"] = rates.decay(step)
            momentum = rates.momentum(step)
            if momentum is not None and "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            elif momentum is not None:
                group["momentum"] = momentum

    def _of_group(self, own_decay: float | None, keys: Mapping[str, Any]) -> Rates:
        """The rates of a group that carries a weight decay or a schedule of its own."""
        if own_decay is None and not keys:
            return self
        schedule, decay = self.schedule, self.weight_decay
        if own_decay is not None:
            schedule, decay = replace(schedule, weight_decay_end=None), own_decay
        return replace(self, schedule=with_keys(schedule, keys), weight_decay=decay)

    def _position(self, step: int) -> int:
        """The step that decides: this one, or the first of its epoch, or of an earlier epoch."""
        if self.schedule.per is Per.step:
            return step
        length = self.schedule.every_epochs * self.steps_per_epoch
        return max(0, step // length - self.schedule.late_epochs) * length

    def _warming(self, position: int) -> float:
        low, steps = self.schedule.warmup_lr, self.warmup_steps
        if self.schedule.warmup is Warmup.constant:
            return low
        if self.schedule.warmup is Warmup.log:
            return _between(low, self.peak, math.log(position + 1) / math.log(max(2, steps)))
        return _between(low, self.peak, position / steps)

    def _curve(self, position: int) -> float:
        cfg, peak, (start, length) = self.schedule, self.peak, self.curve
        done = min(1.0, max(0.0, (position - start) / max(1, length)))
        match cfg.name:
            case Schedule.constant:
                return peak
            case Schedule.cosine:
                return _between(peak, cfg.min_lr, _half_cosine(done))
            case Schedule.linear:
                return _between(peak, cfg.min_lr, done)
            case Schedule.polynomial:
                return _between(cfg.min_lr, peak, (1 - done) ** cfg.power)
            case Schedule.exponential:
                epochs = max(0, position - start) / self.steps_per_epoch
                return max(cfg.min_lr, peak * cfg.gamma ** (epochs / (cfg.gamma_epochs or 1)))
            case Schedule.step:
                return peak * cfg.gamma ** self._passed(position)
            case Schedule.wsd:
                end = start + length
                stable = max(self.warmup_steps, end - cfg.decay_share * self.total_steps)
                decayed = (position - stable) / max(1, end - stable)
                return _between(peak, cfg.min_lr, min(1.0, max(0.0, decayed)))
            case Schedule.one_cycle:
                low = peak / cfg.div_factor
                rising, share = self._cycle(position)
                if rising:
                    return _between(low, peak, share)
                return _between(peak, low / cfg.final_div_factor, share)

    def _passed(self, position: int) -> int:
        """Milestones that lie behind."""
        every = self.schedule.gamma_epochs
        if every is not None:
            start, _ = self.curve
            return int(max(0, position - start) / self.steps_per_epoch / every + 1e-9)
        # 0.07 x 100 is 7.000000000000001.
        marks = (share * self.total_steps - 1e-6 for share in self.schedule.milestones)
        return sum(position >= mark for mark in marks)

    def _cycle(self, position: int) -> tuple[bool, float]:
        """Whether one_cycle rises at `position`, and how far it is on its way, 0..1.

        As torch counts: the peak is one step before `rise_share` of the run, the last step has the
        lowest rate.
        """
        top, last = self.schedule.rise_share * self.total_steps - 1, self.total_steps - 1
        if position <= top:
            return True, _half_cosine(position / max(1e-9, top))
        return False, _half_cosine((position - top) / max(1e-9, last - top))


def with_keys(schedule: ScheduleConfig, keys: Mapping[str, Any]) -> ScheduleConfig:
    """`schedule` with some keys replaced, enum members by their names; `ConfigError` for a key or
    a member that is none."""
    enums = {"name": Schedule, "per": Per, "warmup": Warmup}
    known = [field.name for field in fields(schedule)]
    for key, value in keys.items():
        if key not in known:
            raise ConfigError(f"a parameter group's schedule.{key}: {nearest(key, known)}")
        members = enums[key].__members__ if key in enums else {value: None}
        if value not in members:
            raise ConfigError(
                f"a parameter group's schedule.{key}={value}: {nearest(value, members)}"
            )
    return replace(schedule, **{k: enums[k][v] if k in enums else v for k, v in keys.items()})


def _half_cosine(done: float) -> float:
    """0 to 1 along half a period, `done` in 0..1."""
    return 0.5 * (1 - math.cos(math.pi * done))


def _between(first: float, last: float, share: float) -> float:
    return first + (last - first) * share
