"""GMM attention: RetNet Viewed through Convolution (Li and Li, Pattern Recognition 2024).

Before the softmax the logits of every head are multiplied by a mask of the distance of two patches:
a mixture of K Gaussians around distance 0, each with a learned amplitude and width. It costs 2K
parameters a head and layer.

B batch, N patches, H heads, K Gaussians.
Backbones: `gmm_HOST`, and `small_HOST` without a mask, of the paper's five hosts: `vit_patch4_32`,
`swin_patch2_32`, `cait_patch4_32`, `pit_patch2_32`, `t2t_patch4_32`. They are the released code's,
also where that differs from timm's. GMM-ViT averages its tokens, where the ViT without a mask has a
class token, so there is also `mean_vit_patch4_32`, without mask and class token; and
`elm_vit_patch4_32`, whose mask has N*N learned entries for all heads of a layer.
Departures: a Gaussian is computed from the distance; the released code takes powers of
exp(-d^2/2), which underflow beyond a distance of 10. An epoch is one pass over the data, where the
released code's is three (100 of its epochs are 300 of ours). AutoAugment's affine operations are
bilinear, where the code's are nearest or bicubic. PiT's class token and its position are one
parameter, their sum. T2T goes without the class token and the norm that the released code makes and
does not use, and its fixed table of positions has all sines first. CaiT is the released
"cait-tiny", whose figures are the readme's. The readme counts no products of attention in its MACs:
with them they are 0.241 G (Swin), 0.358 G (CaiT), 0.274 G (PiT) and 0.450 G (T2T).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlx.core.errors import ConfigError
from vlx.core.fields import LABEL, Needs, ViewSpec
from vlx.core.method import Builder, ParamGroup
from vlx.core.paper import Paper
from vlx.families.backbone import BackboneClassifier
from vlx.families.classifier import training_view
from vlx.families.configs.classifier import ClassifierConfig
from vlx.methods.gmm_attention._cait import MaskedCait
from vlx.methods.gmm_attention._pit import MaskedPit
from vlx.methods.gmm_attention._swin import MaskedSwin
from vlx.methods.gmm_attention._t2t import MaskedT2t
from vlx.methods.gmm_attention._vit import MaskedVit
from vlx.ops.augment import RandomErasing
from vlx.ops.auto_augment import AutoAugment

PAPER = Paper(
    number=76,
    slug="gmm-attention",
    title="Toward a Deeper Understanding: RetNet Viewed through Convolution",
    year=2024,
    venue="Pattern Recognition",
    url="https://arxiv.org/abs/2309.05375",
    family="backbone",
    commands=("finetune",),
    modalities=("image",),
    trainable_params=2_693_122,
    num_classes=10,
    backbones=(
        "gmm_vit_patch4_32",
        "elm_vit_patch4_32",
        "small_vit_patch4_32",
        "mean_vit_patch4_32",
        "gmm_swin_patch2_32",
        "small_swin_patch2_32",
        "gmm_cait_patch4_32",
        "small_cait_patch4_32",
        "gmm_pit_patch2_32",
        "small_pit_patch2_32",
        "gmm_t2t_patch4_32",
        "small_t2t_patch4_32",
    ),
)


@dataclass(kw_only=True)
class GmmAttentionConfig(ClassifierConfig):
    num_kernels: int | None = None
    """Gaussians of each head and layer; null keeps the model's 5, as the paper. For gmm_* alone."""
    mix_probability: float = 0.5
    """Probability that a step mixes at all; then mixup or CutMix, each half the time. Released
    code: 0.5."""
    mixup: float = 1.0
    """Alpha of mixup; 0 for none. Released code: 1."""
    auto_augment: bool = True
    """AutoAugment's policy for CIFAR-10. Released code: on."""
    rand_augment: float | None = None
    """Magnitude of RandAugment; null for none, as in the released code."""
    erasing: float = 0.25
    """Probability that a box of 2 to 40 % of the image is filled with one colour. Released code:
    0.25."""
    crop_padding: int | None = 4
    """Pad by so many pixels and cut a random window; null takes crop_scale. Released code: 4."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if not 0.0 <= self.mix_probability <= 1.0:
            raise ConfigError(f"method.mix_probability={self.mix_probability} must lie in 0..1")
        if self.num_kernels is not None and self.num_kernels < 1:
            raise ConfigError(f"method.num_kernels={self.num_kernels} must be 1 or more")


_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's
ERASING = RandomErasing(
    area=(0.02, 0.4),
    log_ratio=False,
    # The released code fills normalised images with the mean of those that are not.
    fill=(_MEAN[0] * (1 + _STD[0]), _MEAN[1] * (1 + _STD[1]), _MEAN[2] * (1 + _STD[2])),
)


class GmmAttention(BackboneClassifier):
    Config = GmmAttentionConfig
    Backbone = (MaskedVit, MaskedSwin, MaskedCait, MaskedPit, MaskedT2t)
    models = PAPER.backbones

    def __init__(self, cfg: GmmAttentionConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.mixing = replace(self.mixing, p=cfg.mix_probability)

    @classmethod
    def needs(cls, cfg: GmmAttentionConfig) -> Needs:
        ops = list(training_view(replace(cfg, erasing=0.0)))
        if cfg.auto_augment:
            ops.append(AutoAugment())
        if cfg.erasing:
            ops.append(replace(ERASING, p=cfg.erasing))
        return Needs(views=(ViewSpec("image", ops=tuple(ops)),), fields=(LABEL,))

    @classmethod
    def encoder_arguments(cls, cfg: GmmAttentionConfig) -> Mapping[str, Any]:
        return {} if cfg.num_kernels is None else {"num_kernels": cfg.num_kernels}

    def param_groups(self) -> list[ParamGroup]:
        """All parameters are decayed, masks, biases and norms too, as in the released code."""
        named = [(name, param) for name, param in self.named_parameters() if param.requires_grad]
        return [ParamGroup("decay", named)]


METHOD = GmmAttention
