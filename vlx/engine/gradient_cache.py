"""Batches beyond memory for losses that compare samples: two passes over the micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vlx.core.fields import Batch
from vlx.core.method import Coupled
from vlx.core.step import StepContext, StepOutput
from vlx.engine.parallel import Parallel


def cached_gradients(
    method: Coupled,
    module: nn.Module,
    parallel: Parallel,
    batches: list[Batch],
    seeded: Callable[[int], StepContext],
) -> StepOutput:
    """Gradients of one step, as if all micro-batches were one batch.

    First every micro-batch is embedded without gradient and the loss of all gives the gradient of
    the embeddings; then each is embedded again, with the same draws, to send its rows' gradient
    back. module: what wraps the method for several processes; seeded: seeds every generator for a
    micro-batch and gives its context. Returns the losses, which have no gradient any more.
    """

    def embed() -> list[dict[str, Tensor]]:
        return [method.embed(batch, seeded(micro)) for micro, batch in enumerate(batches)]

    with torch.no_grad(), parallel.accelerator.autocast():
        parts = parallel.inside(module, embed)
    names = list(parts[0])
    together = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in names}
    sizes = [len(part[names[0]]) for part in parts]
    last = len(batches) - 1

    def compare() -> tuple[StepOutput, tuple[Tensor | None, ...]]:
        """The losses, without gradient, and the gradients of the embeddings."""
        with parallel.accelerator.autocast():
            out = method.losses(together, seeded(last))
        total = torch.stack([loss.float() for loss in out.losses.values()]).sum()
        grads = torch.autograd.grad(total, [together[name] for name in names], allow_unused=True)
        losses = {name: loss.detach() for name, loss in out.losses.items()}
        return StepOutput(losses, out.metrics), grads

    out, found = parallel.inside(module, compare)
    pulled = {
        name: grad.split(sizes) for name, grad in zip(names, found, strict=True) if grad is not None
    }
    fixed = {name: value.detach() for name, value in together.items()}
    for micro, batch in enumerate(batches):
        ctx = seeded(micro)
        rows = {name: grads[micro] for name, grads in pulled.items()}
        with parallel.accumulate_locally(module, micro == last):
            with parallel.accelerator.autocast():
                # The loss's own parameters (a temperature) get their gradient with the last one.
                value = module(batch, ctx, rows, fixed if micro == last else None)
            parallel.accelerator.backward(value)
    return out
