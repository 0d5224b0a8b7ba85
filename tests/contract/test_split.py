"""A step's gradients are those of its whole batch, however it is split.

What is compared is every method in eval mode: batch norms use their running statistics, nothing is
dropped and nothing is mixed, as these depend on the split by design (`train.sync_batchnorm` is for
the first). Masks, corruptions and hidden words are drawn as in training. Methods whose loss
compares samples go through cached gradients, or refuse to accumulate; their processes exchange
features, so that only real ones can tell (tests/methods).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.contract.build import build, config, context, engine_steps, smoke_batch
from vlx.core import registry
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch
from vlx.core.method import Coupled, Trainable
from vlx.data.pipeline import Share
from vlx.engine.build import check_build
from vlx.engine.step import counted, mean_counts

SIZE = 16  # four groups of four: GMML takes alien pixels from within a group
pytestmark = pytest.mark.parametrize("slug", sorted(registry.papers()))


def parts_of(batch: Batch, share: Share) -> list[Batch]:
    """The micro-batches of one process."""
    starts = [share.offset(micro) for micro in range(share.accumulate)]
    return [{name: v[at : at + share.micro] for name, v in batch.items()} for at in starts]


def method_of(slug: str) -> Trainable:
    """In eval mode, its gradients as backward leaves them: what clips them does so after processes
    have exchanged theirs."""
    method = build(slug).eval()
    method.before_update = lambda ctx: None
    return method


def gradients(slug: str, share: Share, mean: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Of one process, by the engine's step. mean: of the counts, over processes."""
    method = method_of(slug)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad])
    steps = engine_steps(slug, method, optimizer, share, clip_norm=None)
    steps.parallel.mean = mean
    steps.gradients(0, iter(parts_of(smoke_batch(slug, batch_size=SIZE), share)))
    return {n: p.grad for n, p in method.named_parameters() if p.grad is not None}


def counts_of(slug: str, share: Share) -> Tensor:
    """What one process says before the counts of all are known; (0,) for nothing."""
    said = [torch.zeros(0)]
    method, parts = method_of(slug), parts_of(smoke_batch(slug, batch_size=SIZE), share)
    contexts = [replace(context(), sample_offset=share.offset(m)) for m in range(share.accumulate)]
    steps = engine_steps(slug, method, torch.optim.SGD(method.parameters()), share)
    steps.parallel.mean = lambda values: (said.append(values), values)[1]
    mean_counts(method, parts, contexts, steps.parallel)
    return said[-1]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to rounding: of a tensor's own largest value, and of the largest of all, as some
    gradients are rounding and nothing else (a bias of all keys)."""
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        allowed = 1e-4 * float(grad.abs().max()) + 1e-5 * largest
        assert float((found[name] - grad).abs().max()) <= allowed, name


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_gradients_of_a_split_batch_are_those_of_the_whole(
    slug: str, world: int, accumulate: int
) -> None:
    cls = registry.load(slug)
    assert issubclass(cls, Trainable)
    if cls.couples_batch and world > 1:
        pytest.skip("compares the samples of all processes")
    if cls.couples_batch and not issubclass(cls, Coupled):
        cfg = config(slug)
        with pytest.raises(ConfigError, match="micro-batches would change it"):
            check_build(replace(cfg, train=replace(cfg.train, accumulate=accumulate)))
        return
    whole = gradients(slug, Share(SIZE), lambda counts: counts)
    shares = [Share(SIZE, accumulate, rank, world) for rank in range(world)]
    counts = torch.stack([counts_of(slug, share) for share in shares]).mean(0)
    found = [gradients(slug, share, lambda _: counts) for share in shares]
    means = {name: torch.stack([grads[name] for grads in found]).mean(0) for name in whole}
    assert_equal(means, whole)


def test_the_losses_that_count_say_what_they_count(slug: str) -> None:
    """The count of a whole batch is the sum of its parts', and its loss does not change by it."""
    method, batch = method_of(slug), smoke_batch(slug, batch_size=SIZE)
    if not counted(method):
        pytest.skip("counts nothing but samples")
    whole = method.counts(batch, context())
    share = Share(SIZE, 4)
    found = [
        method.counts(part, replace(context(), sample_offset=share.offset(micro)))
        for micro, part in enumerate(parts_of(batch, share))
    ]
    for name, count in whole.items():
        values = [float(part[name]) for part in found]
        assert sum(values) == float(count)
        assert len(set(values)) > 1, f"{name} is the same for every part: no need to count it"
    plain, known = context(), replace(context(), counts=whole)
    assert method.step(batch, plain).losses == method.step(batch, known).losses
