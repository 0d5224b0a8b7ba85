"""Builds any method from a preset, and batches for any `Needs`, without data."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from vlx.config.compose import compose
from vlx.core import registry
from vlx.core.fields import Batch, Needs
from vlx.core.method import StepContext, Trainable
from vlx.encoders.build import EncoderBuilder
from vlx.engine.config import RunConfig
from vlx.engine.load import run_config
from vlx.families.classifier import Classifier

NUM_CLASSES = 10


@lru_cache
def smoke_config(slug: str) -> dict[str, Any]:
    command = registry.find(slug).paper.commands[0]
    return compose(slug, command, "smoke", ["track=none"])


def config(slug: str, preset: str = "smoke") -> RunConfig:
    if preset == "smoke":
        return run_config(smoke_config(slug))
    return run_config(compose(slug, registry.find(slug).paper.commands[0], preset))


def build(slug: str, preset: str = "smoke", seed: int = 0) -> Trainable:
    """The method of a preset, with weights of a seed; paths to weights are ignored."""
    cfg = config(slug, preset)
    torch.manual_seed(seed)
    roles = {"encoder": cfg.encoder, "teacher": cfg.teacher}
    cls = registry.load(slug)
    assert issubclass(cls, Trainable)
    return cls(cfg.method, EncoderBuilder(roles, NUM_CLASSES, load_weights=False))


def batch_for(needs: Needs, size: int, batch_size: int = 8, seed: int = 0) -> Batch:
    """A random batch with everything `needs` names."""
    generator = torch.Generator().manual_seed(seed)
    batch: Batch = {"sample_id": torch.arange(batch_size)}
    for view in needs.views:
        if view.keep:
            side = view.size or size
            batch[view.name] = torch.rand(batch_size, 3, side, side, generator=generator)
    for field in needs.fields:
        assert field.name == "label", f"make {field} here"
        batch["label"] = torch.randint(NUM_CLASSES, (batch_size,), generator=generator)
    return batch


def context(step: int = 0, seed: int = 0) -> StepContext:
    generator = torch.Generator().manual_seed(step)
    return StepContext(
        step=step, total_steps=100, steps_per_epoch=10, seed=seed, generator=generator
    )


def seeded_step(method: Trainable, batch: Batch, step: int = 0, seed: int = 0):
    """One step under the loop's own seeding."""
    torch.manual_seed(seed * 1000 + step)
    return method.step(batch, context(step, seed))


def smoke_batch(slug: str, **kwargs: Any) -> Batch:
    cfg = config(slug)
    needs = registry.load(slug).needs(cfg.method)
    return batch_for(needs, cfg.encoder.image_size, **kwargs)


def assert_compiles_whole(slug: str) -> None:
    """A classifier's logits, in evaluation, are one graph of torch.compile, with equal values."""
    method = build(slug).eval()
    assert isinstance(method, Classifier)
    side = config(slug).encoder.image_size
    images = torch.rand(2, 3, side, side)
    compiled = torch.compile(method.class_logits, fullgraph=True)
    with torch.no_grad():
        expected = method.class_logits(images)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
