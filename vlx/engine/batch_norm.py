"""Batch norms whose statistics are those of all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from vlx.core.errors import ConfigError


class SharedBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm, whose kernels exist for GPUs alone, on any device."""

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda or not self.training or not dist.is_initialized():
            return super().forward(input)
        shape = (1, -1, *[1] * (input.ndim - 2))
        over = [0, *range(2, input.ndim)]
        x = input.float()
        size = x.new_tensor([x.numel() / x.shape[1]])
        sums = all_reduce(torch.cat([x.sum(over), size]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(over)) / count
        self._follow(mean.detach(), (variance * count / (count - 1)).detach())
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics, as torch's batch norms keep them (the variance unbiased)."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        step = self.momentum
        if step is None:
            step = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, step)
        self.running_var.lerp_(variance, step)


def share_batch_norms(module: nn.Module, device: torch.device) -> None:
    """Replace the batch norms inside `module` that have something to train or to keep, by ones
    that share statistics; parameters, buffers and their names stay.

    Raises `ConfigError` on a CPU for norms that hold an activation too (timm's).
    """
    convert_sync_batchnorm(module)  # inside `module`: the module itself is no norm
    if device.type == "cuda":
        return
    for name, parent in list(module.named_modules()):
        for key, part in parent.named_children():
            if type(part) is nn.SyncBatchNorm:
                parent.register_module(key, _any_device(part))
            elif isinstance(part, nn.SyncBatchNorm) and not isinstance(part, SharedBatchNorm):
                kind = type(part).__name__
                raise ConfigError(
                    f"train.sync_batchnorm: {name or 'method'}.{key} is a {kind}, which shares "
                    "statistics on GPUs alone"
                )


def _any_device(norm: nn.SyncBatchNorm) -> SharedBatchNorm:
    """The same norm, the same tensors."""
    shared = SharedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine)
    shared.track_running_stats, shared.training = norm.track_running_stats, norm.training
    for name, param in norm.named_parameters(recurse=False):
        setattr(shared, name, param)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        shared.register_buffer(name, getattr(norm, name))
    return shared
