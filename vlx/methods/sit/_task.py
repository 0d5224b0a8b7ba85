"""What a way of training is to the method around it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlx.core.capability import Capability
from vlx.core.fields import Batch, Needs
from vlx.core.method import Builder, ParamGroup, Trainable
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import VisionEncoder
from vlx.families.classifier import decay_as_models_say

VIEWS = ("first", "second")


class Task(nn.Module):
    """One way of training. The trunk, the encoder that the run is for, is handed to it: `cfg` is
    the method's."""

    def __init__(self, cfg: Any, build: Builder, trunk: VisionEncoder) -> None:
        """Of the trunk, its sizes and first weights count; it is not kept."""
        super().__init__()
        self.cfg = cfg

    @classmethod
    def needs(cls, cfg: Any) -> Needs:
        raise NotImplementedError

    @classmethod
    def build_trunk(cls, build: Builder) -> VisionEncoder:
        """The run's encoder, built before the task."""
        raise NotImplementedError

    def embed(self, trunk: VisionEncoder, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Float tensors (B, ...) from which `losses` follows (`core.method.Coupled`)."""
        raise NotImplementedError

    def losses(self, embeddings: dict[str, Tensor]) -> StepOutput:
        raise NotImplementedError

    def after_step(self, trunk: VisionEncoder, ctx: StepContext) -> None:
        """Nothing follows an update."""

    def param_groups(self, method: Trainable) -> list[ParamGroup]:
        """As DeiT: tokens and position tables are not decayed."""
        return decay_as_models_say(method)

    def exports(self, trunk: VisionEncoder) -> tuple[Capability, ...]:
        raise NotImplementedError
