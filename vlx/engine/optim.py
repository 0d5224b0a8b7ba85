"""Optimizers and their parameter groups."""

from __future__ import annotations

from dataclasses import replace

import torch
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars
from torch import nn

from vlx.core.errors import ConfigError
from vlx.core.method import ParamGroup, Trainable
from vlx.engine.config import OptimConfig, Optimizer


def peak_lr(cfg: OptimConfig, batch_size: int) -> float:
    """The learning rate after warm-up: `lr`, or base_lr x batch_size / 256."""
    if cfg.lr is not None:
        return cfg.lr
    assert cfg.base_lr is not None
    return cfg.base_lr * batch_size / 256


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
            new = replace(group, name=f"{group.name}/layer{depth}", params=[], lr_scale=scale)
            split.setdefault((group.name, depth), new).params.append((name, param))
    return list(split.values())


def build_optimizer(cfg: OptimConfig, groups: list[ParamGroup], lr: float) -> torch.optim.Optimizer:
    """An optimizer over the method's groups. Adam, AdamW and SGD use torch's fused kernels."""
    settings = [
        {
            "params": [param for _, param in group.params],
            "names": [name for name, _ in group.params],
            "lr_scale": group.lr_scale,
            "own_decay": group.weight_decay,
            "schedule": dict(group.schedule),
            "weight_decay": cfg.weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group in groups
        if group.params
    ]
    betas, fused = (cfg.betas[0], cfg.betas[1]), _can_fuse(groups)
    match cfg.name:
        case Optimizer.adamw:
            return torch.optim.AdamW(settings, lr=lr, betas=betas, eps=cfg.eps, fused=fused)
        case Optimizer.adam:
            return torch.optim.Adam(settings, lr=lr, betas=betas, eps=cfg.eps, fused=fused)
        case Optimizer.rmsprop:
            return torch.optim.RMSprop(
                settings, lr=lr, alpha=cfg.alpha, eps=cfg.eps, momentum=cfg.momentum
            )
        case Optimizer.sgd:
            return torch.optim.SGD(settings, lr=lr, momentum=cfg.momentum, fused=fused)
        case Optimizer.lars:
            return Lars(settings, lr=lr, momentum=cfg.momentum)  # pyright: ignore[reportArgumentType]
        case Optimizer.lamb:
            # Clipping is the loop's business (optim.clip_norm); timm's LAMB clips to 1 by itself.
            return Lamb(settings, lr=lr, betas=betas, max_grad_norm=None)


def _can_fuse(groups: list[ParamGroup]) -> bool:
    return all(
        type(p) is nn.Parameter and p.is_floating_point() for g in groups for _, p in g.params
    )
