"""The contract of a method: what it needs, what it trains, what it exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from vlx.core.capability import Capability
from vlx.core.config import MethodConfig
from vlx.core.fields import Batch, Needs
from vlx.core.step import StepContext, StepOutput
from vlx.core.text import Tokenizer


@dataclass(slots=True)
class ParamGroup:
    """Parameters that share an optimizer setting; scales multiply the run's learning rate."""

    name: str
    params: list[tuple[str, nn.Parameter]]
    lr_scale: float = 1.0
    weight_decay: float | None = None
    """None takes the run's weight decay, with its schedule."""
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the run's `schedule` that differ here, e.g. `{"name": "constant"}`; with
    `weight_decay_end` a weight decay of this group's own moves too."""


@runtime_checkable
class Layered(Protocol):
    """A module whose parameters lie in layers: encoders."""

    def layer_depths(self) -> dict[str, int]:
        """Parameter-name prefix to depth, 0 = nearest to the input."""
        ...


class Builder(Protocol):
    """Makes the parts that a recipe chooses, so that a method never sees the config tree."""

    @property
    def num_classes(self) -> int: ...

    @property
    def image_size(self) -> int: ...

    load_weights: bool
    """False where shapes alone matter: files of weights are then left alone."""

    def vision(
        self,
        role: str = "encoder",
        *,
        init: Callable[[Any], None] | None = None,
        num_classes: int = 0,
        head_bias: bool = True,
        arguments: Mapping[str, Any] | None = None,
        frozen: bool | None = None,
        **architecture: Any,
    ) -> Any:
        """A `VisionEncoder`; keywords fix what the paper fixes (position embedding, ...).

        num_classes: with a head for so many classes; 0 for none. head_bias: False for a projection,
        where the model is a plain ViT. arguments: for the model's own constructor, where it is
        not a plain ViT. frozen: the method never trains it and loads no weights itself, so that
        random ones are worth a warning; None: so is every role but "encoder".

        init: the paper's initialisation, applied to the encoder before any checkpoint is loaded.
        """
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the run's text; raises `ConfigError` where the run has none."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the data; empty where it has none, or where only their number is known."""
        ...

    def text(self, *, frozen: bool = False, **architecture: Any) -> Any:
        """A `TextEncoder`; keywords fix what the paper fixes (`causal=False`).

        frozen: the method never trains it, so that random weights are worth a warning.
        """
        ...

    def language_model(self, *, frozen: bool = False) -> Any:
        """A `LanguageModel`."""
        ...


class Method(nn.Module):
    """A paper's method. Subclasses set `Config` and their module sets `METHOD`."""

    Config: ClassVar[type[MethodConfig]]

    def __init__(self, cfg: Any, build: Builder) -> None:
        super().__init__()
        self.cfg = cfg

    @classmethod
    def needs(cls, cfg: Any) -> Needs:
        """Fields and views that `step` reads, known before anything is built."""
        raise NotImplementedError

    @classmethod
    def encoder_arguments(cls, cfg: Any) -> Mapping[str, Any]:
        """What the config sets of the encoder's own constructor, where that is no plain ViT:
        whoever builds a run's encoder without its method needs it too."""
        return {}

    def exports(self) -> tuple[Capability, ...]:
        """What evaluators may use of the method."""
        return ()


class Trainable(Method):
    """A method with a training step. It never calls backward, an optimizer, or `.item()`."""

    couples_batch: ClassVar[bool] = False
    """True when a loss term compares samples: plain gradient accumulation is then refused."""
    shards: ClassVar[bool] = True
    """False when the step goes around the forward of its transformer blocks (hooks inside them):
    FSDP, which gathers weights there, is then refused."""

    frozen_base: bool = False
    """True when little is trained beside a frozen model: what is trained is then saved alone too,
    as an adapter of that model."""

    def inserted(self) -> Sequence[str]:
        """Parameter-name prefixes of what was added to the model, beside what it had itself."""
        return ()

    def frozen_parts(self) -> Sequence[str]:
        """Names of parts beside those in `blocks.frozen.Frozen` whose untrained weights never
        change in a run, running statistics neither: they are saved once, not in every checkpoint.
        """
        return ()

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Losses of one batch; called through DDP, so everything trained must be used here."""
        raise NotImplementedError

    def counts(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Scalars: what `step` divides a sum over this batch by, where that differs between batches
        (words of captions, masked pixels); `ctx.mean` divides.

        Called before the first backward of a step, outside the wrapped module: it reads the batch
        and draws by sample (`ctx.uniform`), but no parameter and no generator.
        """
        return {}

    def param_groups(self) -> list[ParamGroup]:
        """Trainable parameters in two groups: biases, norms and other 1-D tensors undecayed."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return [
            ParamGroup("decay", [(name, p) for name, p in named if p.ndim >= 2]),
            ParamGroup(
                "no_decay", [(name, p) for name, p in named if p.ndim < 2], weight_decay=0.0
            ),
        ]

    def layer_depths(self) -> dict[str, int]:
        """Parameter-name prefix to depth, for layer-wise lr decay: those of the trained encoders.

        What no prefix names (heads, final norms, decoders) keeps the full rate.
        """
        found: dict[str, int] = {}
        for name, part in self.named_modules():
            trained = any(param.requires_grad for param in part.parameters())
            if trained and part is not self and isinstance(part, Layered):
                found |= {f"{name}.{prefix}": d for prefix, d in part.layer_depths().items()}
        return found

    def transformer_blocks(self) -> list[nn.Module]:
        """Members of every list called `blocks`: what is sharded piece by piece."""
        return [
            block
            for name, part in self.named_modules()
            if name.rsplit(".", 1)[-1] == "blocks"
            and isinstance(part, nn.Sequential | nn.ModuleList)
            for block in part
        ]

    def compiled_parts(self) -> list[nn.Module]:
        """What `train.compile` compiles, piece by piece."""
        return self.transformer_blocks()

    def begin_epoch(self, ctx: StepContext) -> None:
        """Called before the first step of an epoch, and not again by a resume in its middle: what
        it sets must be part of the state dict."""

    def before_update(self, ctx: StepContext) -> None:
        """Between backward and the optimizer: freeze a layer's gradient, clip per tensor."""

    def after_step(self, ctx: StepContext) -> None:
        """After the optimizer: momentum teachers, queues."""


def decay_all_but_vectors(method: Trainable) -> list[ParamGroup]:
    """Trainable parameters in two groups as ALBEF's and other scripts make them: vectors
    undecayed, and so a temperature, a scalar there and of shape (1,) here, decayed."""
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    vectors = [(name, p) for name, p in named if p.ndim == 1 and p.numel() > 1]
    others = [(name, p) for name, p in named if p.ndim != 1 or p.numel() == 1]
    return [ParamGroup("decay", others), ParamGroup("no_decay", vectors, weight_decay=0.0)]


@runtime_checkable
class Coupled(Protocol):
    """A coupled method whose step falls into two parts, so that batches beyond memory are possible.

    With `train.accumulate` above 1 the loop first embeds every micro-batch without gradient, then
    takes the loss of all together, and then embeds each again to send the gradients of the
    embeddings back (GradCache, Gao et al. 2021): gradients equal those of one large batch.
    """

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """`(B, ...)` tensors, a row a sample: everything that `losses` compares."""
        ...

    def losses(self, embeddings: dict[str, Tensor], ctx: StepContext) -> StepOutput:
        """Losses of the embeddings of all micro-batches of this process."""
        ...
