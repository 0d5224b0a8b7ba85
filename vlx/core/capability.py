"""What a method can do for an evaluator. Evaluators ask for an ability, never for a class."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from vlx.core.method import StepContext


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
