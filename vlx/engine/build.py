"""Builds the parts of a run from its configuration."""

from __future__ import annotations

import math

import torch

from vlx.core import registry
from vlx.core.errors import ConfigError
from vlx.core.method import Coupled, Trainable
from vlx.core.text import Tokenizer
from vlx.data.pipeline import Share, TrainPipeline
from vlx.data.source import Source
from vlx.encoders.build import EncoderBuilder
from vlx.engine.config import RunConfig, TrainConfig
from vlx.engine.parallel import Parallel
from vlx.engine.text import shape_tokenizer
from vlx.evals.class_texts import class_words

SOME_CLASSES = 1000
"""Where the data, and so their number, is not known."""


def trainable(slug: str) -> type[Trainable]:
    """The method's class; `ConfigError` for a method without a training step."""
    cls = registry.load(slug)
    if not issubclass(cls, Trainable):
        raise ConfigError(f"{slug} has no training step")
    return cls


def build_method(
    cfg: RunConfig, source: Source, tokenizer: Tokenizer | None, *, load_weights: bool
) -> Trainable:
    """The method with the weights of `cfg.seed`, or those that the config names."""
    torch.manual_seed(cfg.seed)
    names = source.info.class_names
    builder = builder_of(cfg, len(names), tokenizer, names, load_weights=load_weights)
    return _build(cfg, builder)


def check_build(cfg: RunConfig) -> None:
    """Raise what building the method raises, without memory, weights or data.

    Its classes are not known yet, so that any number stands for them.
    """
    tokenizer = shape_tokenizer(cfg.text)
    with torch.device("meta"):
        _build(cfg, builder_of(cfg, SOME_CLASSES, tokenizer, load_weights=False))


def builder_of(
    cfg: RunConfig,
    num_classes: int,
    tokenizer: Tokenizer | None,
    class_names: tuple[str, ...] = (),
    *,
    load_weights: bool,
) -> EncoderBuilder:
    """What a method of this run builds its parts with."""
    return EncoderBuilder(
        {"encoder": cfg.encoder, "teacher": cfg.teacher},
        num_classes,
        load_weights,
        text=cfg.text,
        tokenizer=tokenizer,
        class_names=tuple(class_words(class_names)),
    )


def _build(cfg: RunConfig, builder: EncoderBuilder) -> Trainable:
    cls = trainable(cfg.slug)
    if cls.couples_batch and cfg.train.accumulate > 1 and not issubclass(cls, Coupled):
        raise ConfigError(
            f"train.accumulate={cfg.train.accumulate}: a loss of {cfg.slug} compares the "
            "samples of a batch, so micro-batches would change it. Use train.accumulate=1"
        )
    return cls(cfg.method, builder)


def build_pipeline(
    cfg: RunConfig,
    source: Source,
    cls: type[Trainable],
    parallel: Parallel,
    tokenizer: Tokenizer | None = None,
) -> TrainPipeline:
    """This process's share of the training data."""
    return TrainPipeline(
        source,
        cls.needs(cfg.method),
        cfg=cfg.data,
        image_size=cfg.encoder.image_size,
        seed=cfg.seed,
        share=Share(cfg.train.batch_size, cfg.train.accumulate, parallel.rank, parallel.world),
        device=parallel.device,
        tokenizer=tokenizer,
    )


def total_steps(cfg: RunConfig, steps_per_epoch: int) -> int:
    """`train.steps`, or `train.epochs` in steps."""
    if cfg.train.steps is not None:
        return cfg.train.steps
    assert cfg.train.epochs is not None
    return max(1, math.floor(cfg.train.epochs * steps_per_epoch))


def begin_training(method: Trainable, cfg: TrainConfig) -> None:
    """Training mode, in which the method's parts stay out of it with `train.evaluation_mode`."""
    method.train()
    if cfg.evaluation_mode:
        for part in method.children():
            part.eval()
