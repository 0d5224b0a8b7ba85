"""GMML: group masked model learning (Atito, Awais and Kittler, "GMML is All you Need", 2022).

Connected rectangles of an image are destroyed, by noise or by the same places of another image; a
plain ViT reads the whole corrupted image, and a light head paints the clean pixels back.

B batch, N patches, D width, H side of the image.
Departures: rectangles are drawn at once, `max_rectangles` at most, where the source draws until
the area is reached; the alien image comes from the sample's group of four neighbours in the
shuffled batch, not from the whole batch, so that a batch split over processes (in multiples of
four) gives the same loss; the type `shift` moves the whole image by one distance where the source
takes another place for every rectangle; the small crops of the source, off by default, are left
out, and so is its fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vlx.blocks.reconstruction_head import ReconstructionHead
from vlx.core.capability import Capability
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch, Needs, ViewSpec
from vlx.core.method import Builder, Trainable
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures
from vlx.encoders.init import trunc_normal_vit_init
from vlx.families.configs.group_masking import GroupMaskingConfig
from vlx.families.group_masking import CorruptedReconstruction, GroupMasking
from vlx.ops.augment import ColorJitter, GaussianBlur, HorizontalFlip, RandomResizedCrop
from vlx.ops.gradients import clip_each
from vlx.ops.targets import masked_l1

PAPER = Paper(
    number=22,
    slug="gmml",
    title="GMML is All you Need",
    year=2022,
    venue="arXiv",
    url="https://arxiv.org/abs/2205.14986",
    family="masked",
    commands=("pretrain-mim",),
    modalities=("image",),
    trainable_params=22_404_099,
    gmacs=9.486,
)

VIEWS = ("first", "second")


@dataclass(kw_only=True)
class GmmlConfig(GroupMaskingConfig):
    taps: list[int] = field(default_factory=lambda: [6, 8, 10, 12])
    """Blocks whose outputs are averaged for the head; the last must be among them. Code."""
    drop_only: bool = True
    """Count the loss on destroyed pixels only. Official code: true."""
    crop_scale: list[float] = field(default_factory=lambda: [0.05, 1.0])
    """Area of the random resized crop, low and high, 0..1. Official code without small crops."""
    flip: float = 0.5
    """Probability of a horizontal flip. Official code: 0.5."""
    jitter: float = 0.3
    """Probability of the light colour jitter (0.1, hue 0.01). Official code: 0.3."""
    blur: float = 0.1
    """Probability of a Gaussian blur of radius 0.1 to 2 pixels. Official code: 0.1."""


class Gmml(Trainable):
    Config = GmmlConfig

    def __init__(self, cfg: GmmlConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.encoder = build.vision(init=trunc_normal_vit_init)
        spec = self.encoder.spec
        if not cfg.taps or min(cfg.taps) < 1 or max(cfg.taps) != spec.depth:
            raise ConfigError(
                f"method.taps={cfg.taps} must be blocks 1..{spec.depth} of the encoder and hold "
                f"the last, {spec.depth}: later blocks would not be trained"
            )
        self.head = ReconstructionHead(spec.dim, spec.patch_size, spec.grid)
        self.destroy = GroupMasking(cfg, spec.image_size)

    @classmethod
    def needs(cls, cfg: GmmlConfig) -> Needs:
        ops = (
            RandomResizedCrop(scale=(cfg.crop_scale[0], cfg.crop_scale[1])),
            HorizontalFlip(cfg.flip),
            ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.01, p=cfg.jitter),
            GaussianBlur(sigma=(0.1, 2.0), p=cfg.blur),
        )
        return Needs(views=tuple(ViewSpec(name, ops=ops) for name in VIEWS))

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        views = [self.encoder.normalise(batch[name]) for name in VIEWS]
        pairs = [self.destroy(clean, ctx, name) for clean, name in zip(views, VIEWS)]
        clean = torch.cat(views)  # (2B, 3, H, H)
        corrupted, mask = (torch.cat(parts) for parts in zip(*pairs))
        pred = self.predict(corrupted)
        error, count = masked_l1(pred, clean, mask | (not self.cfg.drop_only))
        recon = ctx.mean(error.sum(), "recon", count.sum())
        return StepOutput({"recon": recon}, {"mask_ratio": mask.float().mean()})

    def counts(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Values that the loss is a mean over: three a destroyed pixel."""
        if not self.cfg.drop_only:
            every = sum(batch[name].numel() for name in VIEWS)
            return {"recon": batch[VIEWS[0]].new_tensor(every)}
        masks = [self.destroy.mask(batch[name], ctx, name) for name in VIEWS]
        return {"recon": 3 * torch.stack([mask.sum() for mask in masks]).sum()}

    def predict(self, corrupted: Tensor) -> Tensor:
        """Pixels (B, 3, H, H) at the encoder's scale, from the mean of the taps, normed once."""
        layers = self.encoder(corrupted, layers=self.cfg.taps, normalised=True).layers
        mean = torch.stack([layers[number] for number in self.cfg.taps]).mean(0)
        tokens = self.encoder.vit.norm(mean)  # (B, P + N, D)
        return self.head(tokens[:, self.encoder.spec.num_prefix :])

    def before_update(self, ctx: StepContext) -> None:
        if self.cfg.clip_each is not None:
            clip_each(self.parameters(), self.cfg.clip_each)

    def exports(self) -> tuple[Capability, ...]:
        first = partial(self.destroy, view=VIEWS[0])
        painted = CorruptedReconstruction(self.encoder, first, self.predict)
        return EncoderFeatures(self.encoder), painted


METHOD = Gmml
