"""Builds any method from a preset, and batches for any `Needs`, without data."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from vlx.config.compose import compose
from vlx.core import registry
from vlx.core.fields import Batch, Needs
from vlx.core.method import Trainable
from vlx.core.step import StepContext
from vlx.data.pipeline import Share
from vlx.encoders.config import TextConfig
from vlx.engine.build import builder_of
from vlx.engine.config import Device, LauncherConfig, RunConfig, TrainConfig
from vlx.engine.load import run_config
from vlx.engine.parallel import Parallel, StepModule
from vlx.engine.step import Steps
from vlx.engine.text import shape_tokenizer
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
    cls = registry.load(slug)
    assert issubclass(cls, Trainable)
    names = tuple(f"class {number}" for number in range(NUM_CLASSES))
    tokenizer = shape_tokenizer(cfg.text)
    return cls(cfg.method, builder_of(cfg, NUM_CLASSES, tokenizer, names, load_weights=False))


def batch_for(
    needs: Needs, size: int, batch_size: int = 8, seed: int = 0, text: TextConfig | None = None
) -> Batch:
    """A random batch with everything `needs` names."""
    generator = torch.Generator().manual_seed(seed)
    batch: Batch = {"sample_id": torch.arange(batch_size)}
    for view in needs.views:
        if view.keep:
            side = view.size or size
            batch[view.name] = torch.rand(batch_size, 3, side, side, generator=generator)
    names = {field.name for field in needs.fields}
    if "label" in names:
        batch["label"] = torch.randint(NUM_CLASSES, (batch_size,), generator=generator)
    if needs.text:
        found = _captions(text, batch_size, generator)
        batch |= {name: found[name] for name in ("text", "text_length") if name in names}
    assert set(needs.batch_keys) <= batch.keys(), "make the other fields here"
    return batch


def _captions(text: TextConfig | None, count: int, generator: torch.Generator) -> Batch:
    """Token ids of random words, of different lengths, some longer than the context."""
    tokenizer = shape_tokenizer(text)
    assert tokenizer is not None
    longest = tokenizer.context_length
    letters = torch.randint(97, 123, (count, longest), generator=generator).tolist()
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    words = ["".join(chr(code) for code in row[:n]) for row, n in zip(letters, lengths)]
    found = tokenizer.encode(words)
    return {"text": torch.from_numpy(found.ids), "text_length": torch.from_numpy(found.lengths)}


def context(step: int = 0, seed: int = 0) -> StepContext:
    generator = torch.Generator().manual_seed(step)
    return StepContext(
        step=step, total_steps=100, steps_per_epoch=10, seed=seed, generator=generator
    )


def seeded_step(method: Trainable, batch: Batch, step: int = 0, seed: int = 0):
    """One step under the loop's own seeding."""
    torch.manual_seed(seed * 1000 + step)
    return method.step(batch, context(step, seed))


def engine_steps(
    slug: str, method: Trainable, optimizer: torch.optim.Optimizer, share: Share, **kwargs: Any
) -> Steps:
    """The engine's step for a method, on the CPU; keywords are fields of `Steps`."""
    parallel = Parallel(TrainConfig(device=Device.cpu), LauncherConfig())
    return Steps(
        method=method,
        module=StepModule(method),
        parallel=parallel,
        optimizer=parallel.accelerator.prepare_optimizer(optimizer),  # type: ignore[arg-type]
        share=share,
        seed=0,
        total_steps=100,
        steps_per_epoch=10,
        **({"clip_norm": config(slug).optim.clip_norm} | kwargs),
    )


def smoke_batch(slug: str, **kwargs: Any) -> Batch:
    cfg = config(slug)
    needs = registry.load(slug).needs(cfg.method)
    return batch_for(needs, cfg.encoder.image_size, text=cfg.text, **kwargs)


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
