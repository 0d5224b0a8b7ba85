"""Classifiers whose plain ViT runs on fewer tokens; papers differ in the reducer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vlx.blocks.vit_block import BlockHook, Signal, Signals, TokenReducer
from vlx.core.capability import Capability, ReducedTokens
from vlx.core.errors import ConfigError
from vlx.core.method import Builder
from vlx.encoders.base import EncoderFeatures, EncoderSpec, VisionEncoder
from vlx.families.classifier import Classifier, Logits
from vlx.families.configs.classifier import ClassifierConfig
from vlx.ops.token_state import TokenState


class ReducedClassifier(Classifier):
    """A timm ViT with a token reducer inside its blocks. Subclasses give `build_reducer`."""

    reducer: TokenReducer
    shards = False  # the runner goes around the blocks' own forward

    def __init__(self, cfg: ClassifierConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.encoder: VisionEncoder = build.vision(num_classes=self.num_classes)
        self.encoder.check_hooks()
        self.reducer = self.build_reducer(self.encoder.spec)
        spec = self.encoder.spec
        check_plan(self.reducer, spec)

    def build_reducer(self, spec: EncoderSpec) -> TokenReducer:
        """The paper's reducer for an encoder of these sizes."""
        raise NotImplementedError

    def class_logits(self, images: Tensor) -> Tensor:
        return self.encoder.classify(self.encoder(images, hook=self.reducer))

    def compiled_parts(self) -> list[nn.Module]:
        return [self.encoder]

    def exports(self) -> tuple[Capability, ...]:
        features = EncoderFeatures(self.encoder, self.reducer)
        return Logits(self), features, Reduction(self.encoder, self.reducer)


def check_plan(reducer: TokenReducer, spec: EncoderSpec) -> None:
    """Raise `ConfigError` for what the plan refuses, and for a layer without a patch token."""
    plan = reducer.plan(spec.num_patches, spec.num_prefix, spec.depth)
    for layer, tokens in enumerate(plan):
        if min(tokens) <= spec.num_prefix:
            raise ConfigError(
                f"{type(reducer).__name__} leaves no patch token in layer {layer} of {spec.depth}: "
                "let it keep more"
            )


class Reduction(ReducedTokens):
    """An encoder with and without its reducer."""

    trained_plain = True

    def __init__(self, encoder: VisionEncoder, reducer: TokenReducer) -> None:
        self.encoder, self.reducer = encoder, reducer
        self.image_size = encoder.spec.image_size

    def reduced(self, images: Tensor) -> Tensor:
        return self.encoder.classify(self.encoder(images, hook=self.reducer))

    def plain(self, images: Tensor) -> Tensor:
        return self.encoder.classify(self.encoder(images))

    def token_counts(self) -> dict[str, list[int]]:
        spec = self.encoder.spec
        plan = self.reducer.plan(spec.num_patches, spec.num_prefix, spec.depth)
        return {"attention": [t.attention for t in plan], "mlp": [t.mlp for t in plan]}

    def groups(self, images: Tensor) -> list[tuple[str, Tensor]]:
        seen = _Recorder(self.reducer)
        self.encoder(images, hook=seen)
        return [(f"layer {layer}", groups) for layer, groups in seen.groups]


class AgainstReference(ReducedTokens):
    """A backbone that runs on few tokens by its own design, beside a plain ViT of its size.

    reference: builds that ViT, with the same head; its weights are its own, so costs are compared
    and accuracies are not.
    """

    trained_plain = False

    def __init__(
        self,
        encoder: VisionEncoder,
        reference: Callable[[], VisionEncoder],
        counts: dict[str, list[int]],
    ) -> None:
        self.encoder, self.counts, self.build_reference = encoder, counts, reference
        self.image_size = encoder.spec.image_size
        self._reference: VisionEncoder | None = None

    def reduced(self, images: Tensor) -> Tensor:
        return self.encoder.classify(self.encoder(images))

    def plain(self, images: Tensor) -> Tensor:
        if self._reference is None:
            self._reference = self.build_reference().to(images.device).eval()
        return self._reference.classify(self._reference(images))

    def token_counts(self) -> dict[str, list[int]]:
        return self.counts

    def groups(self, images: Tensor) -> list[tuple[str, Tensor]]:
        return []


class _Recorder(BlockHook):
    """A hook watched: the patches' groups after each layer in which the tokens became fewer."""

    def __init__(self, hook: BlockHook) -> None:
        self.hook = hook
        self.groups: list[tuple[int, Tensor]] = []
        self._tokens = 0

    def signals(self, layer: int) -> Signal:
        return self.hook.signals(layer)

    def attention_bias(self, state: TokenState, layer: int) -> Tensor | None:
        return self.hook.attention_bias(state, layer)

    def before_block(self, state: TokenState, layer: int) -> TokenState:
        self._tokens = state.x.shape[1]
        return self.hook.before_block(state, layer)

    def after_attention(self, state: TokenState, layer: int, signals: Signals) -> TokenState:
        return self.hook.after_attention(state, layer, signals)

    def after_block(self, state: TokenState, layer: int) -> TokenState:
        state = self.hook.after_block(state, layer)
        if state.x.shape[1] < self._tokens:
            self.groups.append((layer + 1, state.owner.where(state.kept, -1)))
        return state
