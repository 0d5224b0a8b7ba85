"""Devices, precision and processes, on accelerate; sharding by torch's own FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlx.core.errors import ConfigError
from vlx.core.fields import Batch
from vlx.core.method import Coupled, Trainable
from vlx.core.step import StepContext
from vlx.engine.batch_norm import share_batch_norms
from vlx.engine.config import Device, LauncherConfig, Precision, Strategy, TrainConfig

T = TypeVar("T")


def surrogate(
    method: Coupled,
    batch: Batch,
    ctx: StepContext,
    pulled: dict[str, Tensor],
    together: dict[str, Tensor] | None,
) -> Tensor:
    """A scalar whose gradient is the step's: rows of embeddings times their gradients, and with
    `together`, the embeddings of all, that of the parameters inside the loss itself."""
    embedded = method.embed(batch, ctx)
    terms = [(embedded[name].float() * grad.float()).sum() for name, grad in pulled.items()]
    if together is not None:
        terms += [loss.float() for loss in method.losses(together, ctx).losses.values()]
    return torch.stack(terms).sum()


class StepModule(nn.Module):
    """What is wrapped for several processes: its forward is the method's step."""

    def __init__(self, method: Trainable) -> None:
        super().__init__()
        self.method = method

    def forward(
        self,
        batch: Batch,
        ctx: StepContext,
        pulled: dict[str, Tensor] | None = None,
        together: dict[str, Tensor] | None = None,
    ) -> Any:
        """(losses, metrics) of a step; with `pulled`, the scalar of `surrogate`."""
        if pulled is not None:
            return surrogate(self.method, batch, ctx, pulled, together)  # type: ignore[arg-type]
        out = self.method.step(batch, ctx)
        return out.losses, out.metrics

    def call(self, function: Callable[[], T]) -> T:
        """Call `function`; under FSDP with the parameters outside the blocks gathered, and those of
        a block while it runs."""
        return function()


class Parallel:
    """This process's device and its place among the others."""

    def __init__(self, train: TrainConfig, launcher: LauncherConfig) -> None:
        on_cpu = train.device is Device.cpu or not torch.cuda.is_available()
        if train.device is Device.cuda and on_cpu:
            raise ConfigError("train.device=cuda, but torch sees no GPU: type `vlx doctor`")
        if train.precision is Precision.fp16 and on_cpu:
            raise ConfigError("train.precision=fp16 needs a GPU; use train.precision=bf16")
        if not dist.is_initialized():  # a second run in one process may choose another precision
            AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision={Precision.fp32: "no"}.get(train.precision, train.precision.value),
        )
        self.strategy = launcher.strategy
        self.sync_batchnorm = train.sync_batchnorm
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.scaled = self.accelerator.scaler is not None
        set_threads(train.threads, launcher.processes)
        if train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(train.deterministic)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over the processes."""
        return self.world > 1 and self.strategy is Strategy.fsdp

    def wrap(self, method: Trainable, compile_blocks: bool) -> nn.Module:
        """The module to call for a step. Build optimizers after this: sharding swaps parameters."""
        method.to(self.device)
        if self.sync_batchnorm and self.world > 1:
            share_batch_norms(method, self.device)
        module: nn.Module = StepModule(method)
        if compile_blocks:
            for part in method.compiled_parts():
                part.compile()
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = init_device_mesh(self.device.type, (self.world,))
            check_shardable(method)
            if not method.shards:
                raise ConfigError(
                    "launcher.strategy=fsdp: this method acts inside its blocks, where FSDP cannot "
                    "gather weights. Use launcher.strategy=ddp"
                )
            for block in method.transformer_blocks():
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)  # in place
            register_fsdp_forward_method(module, "call")
            return module
        if self.world > 1:
            return self.accelerator.prepare_model(module)
        return module

    def accumulate_locally(self, module: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Hold back the gradient exchange until the last micro-batch of a step."""
        if self.world == 1:
            return nullcontext()
        if self.sharded:
            module.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(module)

    def inside(self, module: nn.Module, function: Callable[[], T]) -> T:
        """Call `function` as a part of a step: what it calls of the method gathers its weights."""
        return module.call(function) if self.sharded else function()  # type: ignore[operator]

    def whole(self, module: nn.Module, function: Callable[[], T]) -> T:
        """Call `function` with every parameter whole on every process.

        Sharded weights are gathered before and freed after, so that `function` needs no other
        process: what evaluators do may differ between processes without one waiting for ever.
        """
        if not self.sharded:
            return function()
        from torch.distributed.fsdp import FSDPModule

        sharded = [m for m in module.modules() if isinstance(m, FSDPModule)]
        blocks = [m for m in sharded if m is not module]

        def gathered() -> T:
            for block in blocks:
                block.unshard()
                block.set_reshard_after_forward(False, recurse=False)
            return function()

        try:
            # Through the root's forward hooks: FSDP2 must meet its root first.
            return self.inside(module, gathered)
        finally:
            for block in blocks:
                block.set_reshard_after_forward(True, recurse=False)
            for part in sharded:
                part.reshard()

    def seed(self, seed: int) -> None:
        """Seed the generators of the CPU and of this process's device.

        `torch.manual_seed` costs a stack trace a call on machines without a GPU.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def clip(self, params: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale gradients down to a global norm; returns the norm that they had."""
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes."""
        if self.world == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.world

    def flags(self, *flags: bool) -> list[bool]:
        """Each flag, True on every process when it is True on one: one exchange for all."""
        if self.world == 1:
            return list(flags)
        values = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def gather(self, values: Tensor) -> Tensor:
        """`values` of every process, equal shapes, stacked in the order of the processes."""
        if self.world == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def check_shardable(method: nn.Module) -> None:
    """Raise `ConfigError` for parameters that FSDP2 cannot shard: those of shape ()."""
    scalars = [name for name, param in method.named_parameters() if param.ndim == 0]
    if scalars:
        raise ConfigError(
            f"launcher.strategy=fsdp cannot shard the scalar {scalars[0]}: "
            "use launcher.strategy=ddp, or give it shape (1,)"
        )


def set_threads(threads: int | None, local_processes: int) -> None:
    """CPU threads of this process: as asked, or the cores shared among local processes."""
    if threads is None and local_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // local_processes)
    if threads is not None:
        torch.set_num_threads(threads)
