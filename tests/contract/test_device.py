"""What runs on a device stays there: no tensor on another one, no value read on the host.

Shown with fake CUDA tensors (`tests.contract.fake`), for every method's step and exports, every
view operation, and what evaluators compute of a batch or of features. What has to read says why:
a method in `Paper.waive` (check "device"), anything else in a table here; a reason that is not
needed fails.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import vlx.ops
from tests.contract.build import NUM_CLASSES, build, config, context, smoke_batch
from tests.contract.fake import DEVICE, HOST_READ, all_on_device, move, on_device
from vlx.core import capability as can
from vlx.core import registry
from vlx.core.fields import ViewOp, ViewSpec
from vlx.core.method import Trainable
from vlx.data.views import make_views
from vlx.evals.classification import judged
from vlx.evals.knn import knn_predict
from vlx.evals.probe import fit_logistic
from vlx.evals.ranking import count_ranks, similarity, top_k
from vlx.evals.reconstruction import neighbours
from vlx.evals.registry import EVALUATORS
from vlx.evals.rerank import new_ranks
from vlx.evals.shifts import consistent
from vlx.evals.zero_shot import classify
from vlx.families.token_reduction import AgainstReference
from vlx.ops.augment import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    OneOf,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    Solarize,
    Squeeze,
)
from vlx.ops.auto_augment import AutoAugment
from vlx.ops.mixing import Mixing, Mixture, soft_target_cross_entropy
from vlx.ops.rand_augment import ALBEF_RANDOM, OPERATIONS, RandAugment

SLUGS = sorted(registry.papers())
NAMES = tuple(f"class {number}" for number in range(NUM_CLASSES))
# A GPU's own kernels may run where a context is missed here.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU tells for itself")


def assert_on_device(found: Any) -> None:
    """All tensors of nested results."""
    if isinstance(found, Tensor):
        assert found.device == DEVICE
    elif isinstance(found, dict):
        assert_on_device(list(found.values()))
    elif isinstance(found, list | tuple):
        for item in found:
            assert_on_device(item)


# --- methods


def waived(slug: str) -> bool:
    return "device" in dict(registry.papers()[slug].waive)


def step(slug: str, method: Trainable, mode: FakeTensorMode) -> None:
    batch = all_on_device(mode, smoke_batch(slug))
    ctx = context()
    ctx.generator = None  # a generator of the device wants a real one
    with mode:
        method.begin_epoch(ctx)
        counts = method.counts(batch, ctx)
        out = method.step(batch, replace(ctx, counts=counts))
        assert_on_device([counts, out.losses, out.metrics])
        method.after_step(ctx)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_step_stays_on_its_device(slug: str) -> None:
    method, mode = build(slug), FakeTensorMode()
    move(mode, method)
    if waived(slug):
        with pytest.raises((*HOST_READ, RuntimeError)):
            step(slug, method, mode)
    else:
        step(slug, method, mode)


ABILITIES: dict[type[can.Capability], Callable[[Any, Tensor], Any]] = {
    can.ImageFeatures: lambda own, x: [own.image_features(x), own.patch_features(x)],
    can.Reconstruction: lambda own, x: own.reconstruct(x, context()),
    can.ClassLogits: lambda own, x: own.class_logits(x),
    can.DualEncoder: lambda own, x: [own.joint_image_features(x), own.text_features(NAMES)],
    can.OpenVocabulary: lambda own, x: own.logits_of(x, NAMES[:3]),
    can.PairScorer: lambda own, x: own.pair_scores(x, NAMES[: len(x)]),
    can.ChannelSubsets: lambda own, x: [own.subset_logits(x, c) for c in ((1,), (2, 0))],
    can.ReducedTokens: lambda own, x: [own.reduced(x), own.plain(x), own.groups(x)],
    can.Budgets: lambda own, x: [run(x) for run in own.budgets().values()],
}
READING_ABILITIES: dict[type[can.Capability], tuple[str, Callable[[Any, Tensor], Any]]] = {
    can.Captioner: ("what is written is words, on the host", lambda own, x: own.captions(x, 3)),
}


def test_every_ability_is_tried() -> None:
    assert {*can.Capability.__subclasses__()} == {*ABILITIES, *READING_ABILITIES}


@pytest.mark.parametrize("slug", SLUGS)
def test_what_a_method_exports_stays_on_its_device(slug: str) -> None:
    if waived(slug):
        pytest.skip("as its step")
    method, mode = build(slug).eval(), FakeTensorMode()
    side = config(slug).encoder.image_size
    move(mode, method)
    images = on_device(mode, torch.empty(4, 3, side, side))
    for own in method.exports():
        if isinstance(own, AgainstReference):  # built when it is first asked for, on the CPU
            own._reference = own.build_reference().eval()
            move(mode, own._reference)
        for kind, use in ABILITIES.items():
            if isinstance(own, kind):
                with torch.no_grad(), mode:
                    assert_on_device(use(own, images))
        for kind, (_, use) in READING_ABILITIES.items():
            if isinstance(own, kind):
                with torch.no_grad(), mode, pytest.raises(HOST_READ):
                    use(own, images)


# --- views and batches

OPS: tuple[ViewOp, ...] = (
    RandomResizedCrop(),
    RandomCrop(),
    HorizontalFlip(),
    CenterCrop(),
    Squeeze(),
    ColorJitter(0.4, 0.4, 0.4, 0.1),
    Grayscale(),
    Solarize(),
    GaussianBlur(),
    RandomErasing(fill=(0.5, 0.5, 0.5)),
    OneOf((Grayscale(), Solarize(), GaussianBlur())),
)
READING_OPS: dict[ViewOp, str] = {
    RandAugment(): "how many samples each of 15 operations has: all on all is 15 times the work",
    ALBEF_RANDOM: "as RandAugment",
    AutoAugment(): "as RandAugment",
    RandomErasing(): "how many pixels are erased: noise for all takes 26 times as long (64 at 224)",
}


def view(op: ViewOp, mode: FakeTensorMode, count: int = 32) -> None:
    """A crop, the operation, and a flip of a batch of images."""
    ops = (RandomResizedCrop(), op, HorizontalFlip())
    images = on_device(mode, torch.empty(count, 3, 40, 48, dtype=torch.uint8))
    sizes = on_device(mode, torch.empty(count, 2, dtype=torch.int64))
    keys = on_device(mode, torch.empty(count, dtype=torch.int64))
    specs = (ViewSpec("alone", ops=(op,), size=32), ViewSpec("image", ops=ops))
    with mode:
        views = make_views(images, sizes, keys, specs, 24)
        assert_on_device(views)
    assert views["image"].shape == (count, 3, 24, 24)


def test_every_view_operation_is_tried() -> None:
    """Those of `vlx.ops` and of the methods: a class that draws and is called."""
    found = set()
    for package in (vlx.ops, importlib.import_module("vlx.methods")):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            found |= {
                part
                for part in vars(module).values()
                if isinstance(part, type) and hasattr(part, "draws") and part.__name__ != "ViewOp"
            }
    assert found == {type(op) for op in (*OPS, *READING_OPS)}


@pytest.mark.parametrize("op", OPS, ids=lambda op: type(op).__name__)
def test_a_view_stays_on_its_device(op: ViewOp) -> None:
    view(op, FakeTensorMode())


@pytest.mark.parametrize("op", READING_OPS, ids=lambda op: type(op).__name__)
def test_a_view_that_reads_does_nothing_else_elsewhere(
    op: ViewOp, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HOST_READ):
        view(op, FakeTensorMode())
    # What is read, answered by hand: two samples for each operation, an unknown number of pixels.
    two_each = [[2] * len(OPERATIONS)]
    monkeypatch.setattr(FakeTensor, "tolist", lambda drawn: two_each * len(drawn))
    view(op, FakeTensorMode(shape_env=ShapeEnv()))


@pytest.mark.parametrize("mixture", [Mixture(), Mixture(0.3), Mixture(0.3, (0.4, 0.9))], ids=str)
def test_a_mixed_batch_stays_on_its_device(mixture: Mixture) -> None:
    mode = FakeTensorMode()
    images = on_device(mode, torch.empty(6, 3, 16, 16))
    labels = on_device(mode, torch.empty(6, dtype=torch.int64))
    with mode:
        mixed, targets = Mixing().apply(images, labels, NUM_CLASSES, mixture)
        loss = soft_target_cross_entropy(targets.log(), targets)
        assert_on_device([mixed, targets, loss])


# --- evaluators

COUNT, TEXTS, WIDTH = 6, 9, 5


class Fakes:
    """What evaluators compute with, by name of its shape."""

    def __init__(self, mode: FakeTensorMode) -> None:
        def floats(*shape: int) -> Tensor:
            return on_device(mode, torch.empty(shape))

        def integers(*shape: int) -> Tensor:
            return on_device(mode, torch.empty(shape, dtype=torch.int64))

        self.images, self.features = floats(COUNT, 3, 16, 16), floats(COUNT, WIDTH)
        self.texts, self.scores = floats(TEXTS, WIDTH), floats(COUNT, 4)
        self.logits, self.labels = floats(COUNT, NUM_CLASSES), integers(COUNT)
        self.text, self.own = integers(TEXTS), self.scores > 0

    def sample(self, split: str, count: int) -> list[dict[str, Tensor]]:
        """As `EvalData.sample`."""
        return [{"image": self.images}, {"image": self.images}]

    def get(self, kind: type[can.Capability]) -> Fakes:
        """As `Subject.get`."""
        return self

    def image_features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def of_logits(x: Fakes) -> Tensor:
    return judged(x.logits, x.labels)


# The methods' part, what they export, is above.
ON_DEVICE: dict[str, Callable[[Fakes], Any]] = {
    "knn": lambda x: knn_predict(x.features, x.labels, x.features, NUM_CLASSES, 3),
    "classification": of_logits,
    "base-to-new": of_logits,
    "channels": of_logits,
    "tokens": of_logits,
    "budgets": of_logits,
    "shifts": lambda x: consistent([x.labels, x.logits.argmax(1), x.labels], x.labels),
    "reconstruction": lambda x: neighbours(x, x, x.images),  # type: ignore[arg-type]
    "zero-shot": lambda x: classify(x.features, x.texts, x.labels),
    "retrieval": lambda x: [
        top_k(x.features, x.texts, x.text, 3),
        new_ranks(x.scores, x.own, x.labels),
        similarity(x.features, x.texts),
    ],
}
READING: dict[str, tuple[str, Callable[[Fakes], Any]]] = {
    "linear-probe": (
        "L-BFGS decides by the loss whether it goes on, and backward wants a real context",
        lambda x: fit_logistic(x.features, x.labels, NUM_CLASSES),
    ),
    "retrieval": (
        "how many texts there are, and which pairs of a block are own ones: once a block",
        lambda x: count_ranks(x.features, x.texts, x.text, x.text),
    ),
}


def test_every_evaluator_is_tried() -> None:
    # What "caption" computes is the method's alone.
    assert EVALUATORS.keys() - ON_DEVICE.keys() - READING.keys() == {"caption"}


@pytest.mark.parametrize("name", ON_DEVICE)
def test_what_an_evaluator_computes_stays_on_its_device(name: str) -> None:
    mode = FakeTensorMode()
    x = Fakes(mode)
    with torch.no_grad(), mode:
        assert_on_device(ON_DEVICE[name](x))


@pytest.mark.parametrize("name", READING)
def test_an_evaluator_that_reads_has_to(name: str) -> None:
    mode = FakeTensorMode()
    x = Fakes(mode)
    with mode, pytest.raises((*HOST_READ, RuntimeError)):
        READING[name][1](x)
