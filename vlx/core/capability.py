"""What a method can do for an evaluator. Evaluators ask for an ability, never for a class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from vlx.core.step import StepContext


class Capability(ABC):  # noqa: B024 - a marker; each kind has its own abstract methods
    """Base of everything that `Method.exports` may return."""


class ImageFeatures(Capability):
    """One vector per image, for k-NN, linear probes and retrieval."""

    @abstractmethod
    def image_features(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, D), not normalised."""

    @abstractmethod
    def patch_features(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, D, h, w)."""


class Reconstruction(Capability):
    """Repaints what it hides, for pictures."""

    @abstractmethod
    def reconstruct(self, images: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """images: (B, 3, H, W) in 0..1. Returns (what the model saw, its reconstruction), alike."""


class ClassLogits(Capability):
    """Classifies images among the classes of the data."""

    @abstractmethod
    def class_logits(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, C)."""


class DualEncoder(Capability):
    """Images and texts in one space, for zero-shot classification and retrieval."""

    @property
    @abstractmethod
    def logit_scale(self) -> float:
        """Cosine similarities times this are the logits that the model was trained with."""

    @abstractmethod
    def joint_image_features(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, E) of unit length."""

    @abstractmethod
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Returns (T, E) of unit length, on the model's device."""


class OpenVocabulary(Capability):
    """Classifies images among classes that are named at the time of use."""

    @abstractmethod
    def logits_of(self, images: Tensor, class_names: Sequence[str]) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns (B, C) for C names."""


class PairScorer(Capability):
    """Scores pairs of an image and a text together: re-ranks what a dual encoder found."""

    @abstractmethod
    def pair_scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1, and B texts, one each. Returns (B,): higher fits
        better."""


class Captioner(Capability):
    """Says in words what an image shows."""

    @abstractmethod
    def captions(self, images: Tensor, max_new_tokens: int) -> list[str]:
        """images: (B, 3, H, W), RGB in 0..1. Returns B captions, decoded greedily."""


class ChannelSubsets(Capability):
    """Classifies images of which only some channels are there."""

    num_channels: int

    @abstractmethod
    def subset_logits(self, images: Tensor, channels: Sequence[int]) -> Tensor:
        """images: (B, C, H, W), RGB in 0..1; channels: those that may be used. Returns (B, K) of
        K classes."""


class ReducedTokens(Capability):
    """A model that runs on fewer tokens than a plain one, for measurements side by side."""

    image_size: int
    """Side of the images that it takes, in pixels."""
    trained_plain: bool
    """True when `plain` is this model itself without reduction, so that its accuracy means
    something; False for a reference model of the same size with weights of its own."""

    @abstractmethod
    def reduced(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), RGB in 0..1. Returns what the model computes, e.g. (B, C)."""

    @abstractmethod
    def plain(self, images: Tensor) -> Tensor:
        """The same without reduction."""

    @abstractmethod
    def token_counts(self) -> dict[str, list[int]]:
        """Tokens, prefix included, by layer: what attention and what the MLP runs on."""

    @abstractmethod
    def groups(self, images: Tensor) -> list[tuple[str, Tensor]]:
        """What became of the patches, for pictures.

        Returns (title, (B, P) int64) of chosen layers: patches of one token share a number, -1 is
        a patch that no token of its own carries any more.
        """


class Budgets(Capability):
    """One classifier whose cost is chosen at the time of use."""

    image_size: int
    """Side of the images that it takes, in pixels."""

    @abstractmethod
    def budgets(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """By the budget's name: images (B, 3, H, W), RGB in 0..1, to class logits (B, C)."""
