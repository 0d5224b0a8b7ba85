"""Optimizers and schedules. Rates are pure functions of the step, so nothing is saved of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars
from torch import nn

from vlx.core.errors import ConfigError
from vlx.core.method import ParamGroup, Trainable
from vlx.engine.config import OptimConfig, Optimizer, Per, Schedule, ScheduleConfig


def peak_lr(cfg: OptimConfig, batch_size: int) -> float:
    """The learning rate after warm-up: `lr`, or base_lr x batch_size / 256."""
    if cfg.lr is not None:
        return cfg.lr
    assert cfg.base_lr is not None
    return cfg.base_lr * batch_size / 256


@dataclass(frozen=True)
class Rates:
    """Learning rate and weight decay at any step."""

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

    def _position(self, step: int) -> int:
        """The step that decides: this one, or its epoch's first."""
        if self.schedule.per is Per.step:
            return step
        return step - step % self.steps_per_epoch

    def lr(self, step: int) -> float:
        """For the update number `step` (from 0), before any per-group scale."""
        cfg, step = self.schedule, self._position(step)
        if step < self.warmup_steps:
            low = cfg.warmup_lr
            return low + (self.peak - low) * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if cfg.name is Schedule.constant:
            return self.peak
        if cfg.name is Schedule.step:
            passed = sum(step >= share * self.total_steps for share in cfg.milestones)
            return self.peak * cfg.gamma**passed
        if cfg.name is Schedule.wsd:
            decayed = max(0.0, (step / self.total_steps - (1 - cfg.decay_share)) / cfg.decay_share)
            return self.peak + (cfg.min_lr - self.peak) * decayed
        return cfg.min_lr + (self.peak - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def decay(self, step: int) -> float:
        """Weight decay at `step`, for groups that do not carry their own."""
        step = self._position(step)
        end = self.schedule.weight_decay_end
        if end is None:
            return self.weight_decay
        done = step / max(1, self.total_steps)
        return end + (self.weight_decay - end) * 0.5 * (1 + math.cos(math.pi * done))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the step's rates into the optimizer's groups."""
        lr, decay = self.lr(step), self.decay(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = decay if group["own_decay"] is None else group["own_decay"]


def layer_scales(groups: list[ParamGroup], method: Trainable, decay: float) -> list[ParamGroup]:
    """Groups split by depth, the rate of depth d scaled by decay ** (top - d).

    `top` is one more than the deepest layer: the depth of whatever belongs to no layer, such as a
    head or a final norm, whose rate is not scaled (BEiT, and MAE's fine-tuning code).
    """
    depths = method.layer_depths()
    if not depths:
        raise ConfigError(f"optim.layer_decay={decay}: this method's encoder names no layers")
    top = max(depths.values()) + 1

    def depth_of(name: str) -> int:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((depths[prefix] for prefix in prefixes if prefix in depths), top)

    split: dict[tuple[str, int], ParamGroup] = {}
    for group in groups:
        for name, param in group.params:
            depth = depth_of(name)
            scale = group.lr_scale * decay ** (top - depth)
            new = ParamGroup(f"{group.name}/layer{depth}", [], scale, group.weight_decay)
            split.setdefault((group.name, depth), new).params.append((name, param))
    return list(split.values())


def build_optimizer(cfg: OptimConfig, groups: list[ParamGroup], lr: float) -> torch.optim.Optimizer:
    """An optimizer over the method's groups. AdamW and SGD use torch's fused kernels."""
    settings = [
        {
            "params": [param for _, param in group.params],
            "names": [name for name, _ in group.params],
            "lr_scale": group.lr_scale,
            "own_decay": group.weight_decay,
            "weight_decay": cfg.weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group in groups
        if group.params
    ]
    betas = (cfg.betas[0], cfg.betas[1])
    if cfg.name is Optimizer.adamw:
        fused = _can_fuse(groups)
        return torch.optim.AdamW(settings, lr=lr, betas=betas, eps=cfg.eps, fused=fused)
    if cfg.name is Optimizer.sgd:
        return torch.optim.SGD(settings, lr=lr, momentum=cfg.momentum, fused=_can_fuse(groups))
    if cfg.name is Optimizer.lars:
        return Lars(settings, lr=lr, momentum=cfg.momentum)  # pyright: ignore[reportArgumentType]
    # Clipping is the loop's business (optim.clip_norm); timm's LAMB would clip to 1 by itself.
    return Lamb(settings, lr=lr, betas=betas, max_grad_norm=None)


def _can_fuse(groups: list[ParamGroup]) -> bool:
    return all(
        type(p) is nn.Parameter and p.is_floating_point() for g in groups for _, p in g.params
    )
