"""Two towers by CLIP's loss: the step of methods that differ in towers and recipe."""

from __future__ import annotations

from torch import Tensor

from vlx.blocks.logit_scale import LogitScale
from vlx.core.capability import Capability
from vlx.core.fields import Batch
from vlx.core.method import ParamGroup, Trainable
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures
from vlx.families.dual_encoder import JointSpace, Towers, exempt_class_tokens
from vlx.ops.contrastive import clip_loss


class ContrastivePairs(Trainable):
    """Within a batch each image is nearest to its own caption and each caption to its own image
    (CLIP, Radford et al. 2021, section 2.3). Subclasses set the two parts below."""

    couples_batch = True

    towers: Towers
    logit_scale: LogitScale

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        return {
            "image": self.towers.embed_images(batch["image"]),  # (B, E)
            "text": self.towers.embed_text(batch["text"], batch["text_length"]),  # (B, E)
        }

    def losses(self, embeddings: dict[str, Tensor], ctx: StepContext) -> StepOutput:
        scale = self.logit_scale()
        loss = clip_loss(embeddings["image"], embeddings["text"], scale)
        return StepOutput({"contrastive": loss}, {"logit_scale": scale.detach()})

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        return self.losses(self.embed(batch, ctx), ctx)

    def after_step(self, ctx: StepContext) -> None:
        self.logit_scale.clamp()

    def param_groups(self) -> list[ParamGroup]:
        return exempt_class_tokens(super().param_groups())

    def exports(self) -> tuple[Capability, ...]:
        joint = JointSpace(self.towers, self.logit_scale)
        return joint, EncoderFeatures(self.towers.image)
