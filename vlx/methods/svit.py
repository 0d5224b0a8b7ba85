"""SViT: Vision Transformer with Super Token Sampling (Huang et al., CVPR 2023).

A pyramid of convolutional position encoding, attention and a convolutional MLP. In its first two
stages attention runs among super tokens: pooled from the map, refined by one k-means-like step of
soft association with the 3x3 around each cell, and spread back by the same association.

B batch, C channels, H x W the map of a stage.
Departures: the model beside which costs are measured is this backbone with super tokens of one
token each, plain attention on all of them in every stage. The fixed kernels that the official code
stores for gathering neighbours are no parameters here. Layer scales are not decayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers.drop import DropPath, calculate_drop_path_rates
from timm.layers.layer_scale import LayerScale2d
from timm.layers.norm import LayerNorm2d
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlx.blocks.super_tokens import SuperTokenAttention
from vlx.blocks.timm_model import default_cfgs as cfgs_of
from vlx.core.capability import Capability
from vlx.core.errors import ConfigError
from vlx.core.method import Builder
from vlx.core.paper import Paper
from vlx.core.released import Renames, next_stage, renamed
from vlx.encoders.base import EncoderFeatures, VisionEncoder
from vlx.families.classifier import Classifier, Logits
from vlx.families.configs.classifier import ClassifierConfig
from vlx.families.token_reduction import AgainstReference

PAPER = Paper(
    number=100,
    slug="svit",
    title="Vision Transformer with Super Token Sampling",
    year=2023,
    venue="CVPR",
    url="https://arxiv.org/abs/2211.11167",
    family="token reduction",
    commands=("prune-tokens", "finetune"),
    modalities=("image",),
    trainable_params=25_495_624,
    gmacs=4.34,
    backbones=("svit_small", "svit_base", "svit_large"),
)


@dataclass(kw_only=True)
class SvitConfig(ClassifierConfig):
    stem_stride: int = 4
    """Pixels between tokens of the first stage: 4, or 2 and 1 for small images. Paper: 4."""
    super_tokens: list[int] | None = None
    """Side of a super token's cell, by stage; 1 is plain attention. null: the model's own, 8, 4, 1,
    1. The paper's detectors: 16, 8, 2, 1."""
    stage_dims: list[int] | None = None
    """Channels by stage, which also says how many stages there are; null: the model's own."""
    stage_depths: list[int] | None = None
    """Blocks by stage; null: the model's own."""
    stage_heads: list[int] | None = None
    """Attention heads by stage; null: the model's own."""

    def __post_init__(self) -> None:
        ClassifierConfig.__post_init__(self)
        if self.stem_stride not in (1, 2, 4):
            raise ConfigError(f"method.stem_stride={self.stem_stride} must be 1, 2 or 4")
        by_stage = {
            "super_tokens": self.super_tokens,
            "stage_dims": self.stage_dims,
            "stage_depths": self.stage_depths,
            "stage_heads": self.stage_heads,
        }
        given = {name: values for name, values in by_stage.items() if values is not None}
        for name, values in given.items():
            if not values or min(values) < 1:
                raise ConfigError(f"method.{name}={values} must be counts of 1 or more")
        counts = {name: len(values) for name, values in given.items()}
        if len(counts) < len(by_stage):
            counts["the model's own"] = 4
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ConfigError(f"svit's lists have one number a stage, but these have: {found}")
        dims, heads = self.stage_dims, self.stage_heads
        if dims and heads and any(dim % head for dim, head in zip(dims, heads)):
            raise ConfigError(f"method.stage_dims={dims} must be multiples of stage_heads={heads}")


class Stem(nn.Sequential):
    """Four 3x3 convolutions, each before GELU and batch norm; two may have stride 2."""

    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        first, third = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[stride]
        plan = [(in_chans, dim // 2, first), (dim // 2, dim // 2, 1), (dim // 2, dim, third)]
        layers: list[nn.Module] = []
        for wide, out, step in [*plan, (dim, dim, 1)]:
            layers += [nn.Conv2d(wide, out, 3, step, 1), nn.GELU(), nn.BatchNorm2d(out)]
        super().__init__(*layers)


class ConvMlp(nn.Module):
    """An MLP over channels with a depth-wise 3x3 residual between its layers."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.conv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        return self.fc2(self.conv(x).add_(x))  # in place: the widest map, and no gradient reads it


class SuperTokenBlock(nn.Module):
    """Position encoding, super token attention, MLP, each added to its input (B, C, H, W)."""

    def __init__(
        self, dim: int, heads: int, size: int, *, drop_path: float, layer_scale: float | None
    ) -> None:
        super().__init__()

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale)

        self.pos_embed = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        self.attn = SuperTokenAttention(dim, heads, size)
        self.ls1 = scale()
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, 4 * dim)
        self.ls2 = scale()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x).add_(x)
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Stage(nn.Module):
    """Blocks of one width, after a convolution that halves the map, save in the first stage."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)  # type: ignore[assignment]
        return x


_RELEASED: Renames = (
    (r"^patch_embed\.proj\.", "stem."),
    (r"^layers\.(\d)\.downsample\.proj\.", next_stage("downsample.")),
    (r"^layers\.(\d)\.", r"stages.\1."),
    (r"\.attn\.(?:un)?fold\.", None),  # identities
    (r"\.pos_embed\.conv\.", ".pos_embed."),
    (r"\.norm1\.norm\.", ".norm1."),
    (r"\.attn\.stoken_refine\.", ".attn.attention."),
    (r"\.mlp2\.conv\.conv\.", ".mlp.conv."),
    (r"\.mlp2\.", ".mlp."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^proj\.", "head_conv."),
    (r"^norm\.", "head_norm."),
)


class SuperTokenVit(nn.Module):
    """The backbone under timm's conventions; lists have one entry a stage.

    layer_scale: the initial scale of the blocks' branches; None leaves it out. head_dim: width of
    the 1x1 convolution before pooling.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        super_tokens: Sequence[int] = (8, 4, 1, 1),
        layer_scale: Sequence[float | None] = (None, None, None, None),
        head_dim: int = 1024,
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.stem_stride = num_classes, in_chans, stem_stride
        self.num_features, self.head_hidden_size = dims[-1], head_dim
        self.grad_checkpointing = False
        self.stem = Stem(in_chans, dims[0], stem_stride)
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages, self.feature_info = [], []
        for number, (dim, depth, head, size) in enumerate(zip(dims, depths, heads, super_tokens)):
            smaller: nn.Module = nn.Identity()
            if number:
                conv = nn.Conv2d(dims[number - 1], dim, 3, 2, 1)
                smaller = nn.Sequential(conv, nn.BatchNorm2d(dim))
            scale = layer_scale[number]
            blocks = [
                SuperTokenBlock(dim, head, size, drop_path=float(next(rates)), layer_scale=scale)  # type: ignore[arg-type]
                for _ in range(depth)
            ]
            stages.append(Stage(smaller, blocks))
            where = {"reduction": stem_stride * 2**number, "module": f"stages.{number}"}
            self.feature_info.append({"num_chs": dim, **where})
        self.stages = nn.Sequential(*stages)
        self.head_conv = nn.Conv2d(dims[-1], head_dim, 1)
        self.head_norm = nn.BatchNorm2d(head_dim)
        self.head_act = nn.SiLU()
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer, none for 0 classes. global_pool: avg, or "" for the map before it."""
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ConfigError(f"svit pools by avg or not at all; global_pool={global_pool}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):  # the only layer with an initialisation of its own
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        return self.head

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the official names."""
        found = renamed(state, _RELEASED)
        for name, value in found.items():
            if name.endswith(".gamma"):
                found[name] = value.flatten()
        return found

    def no_weight_decay(self) -> set[str]:
        """Nothing beside what never decays: biases, norms and scales, which are 1-D."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^head_(?:conv|norm)", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to the last stage's map (B, C, H / 32, W / 32).

        Maps keep a position's channels together in memory, as super tokens and depth-wise
        convolutions read them: a third faster on a CPU (benchmarks/RESULTS.md).
        """
        return self.stages(self.stem(x.contiguous(memory_format=torch.channels_last)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_act(self.head_norm(self.head_conv(x)))
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = self.head_drop(x)
        if pre_logits or self.global_pool == "":
            return x
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _create(variant: str, pretrained: bool, sizes: dict[str, Any]) -> SuperTokenVit:
    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return build_model_with_cfg(
        SuperTokenVit, variant, pretrained, feature_cfg=feature_cfg, **sizes
    )


default_cfgs = cfgs_of(PAPER.backbones, first_conv="stem.0")


@register_model
def svit_small(pretrained: bool = False, **kwargs: Any) -> SuperTokenVit:
    """25 M parameters, 4.4 GMACs (paper, table 1)."""
    sizes = {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "heads": (1, 2, 5, 8)}
    return _create("svit_small", pretrained, sizes | kwargs)


@register_model
def svit_base(pretrained: bool = False, **kwargs: Any) -> SuperTokenVit:
    """52 M parameters, 9.9 GMACs."""
    sizes = {"dims": (96, 192, 384, 512), "depths": (4, 6, 14, 6), "heads": (2, 3, 6, 8)}
    scale = {"layer_scale": (None, None, 1e-6, 1e-6)}
    return _create("svit_base", pretrained, sizes | scale | kwargs)


@register_model
def svit_large(pretrained: bool = False, **kwargs: Any) -> SuperTokenVit:
    """95 M parameters, 15.6 GMACs."""
    sizes = {"dims": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "heads": (2, 3, 7, 10)}
    scale = {"layer_scale": (None, None, 1e-6, 1e-6)}
    return _create("svit_large", pretrained, sizes | scale | kwargs)


class Svit(Classifier):
    Config = SvitConfig

    def __init__(self, cfg: SvitConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        arguments = self.encoder_arguments(cfg)
        self.encoder: VisionEncoder = build.vision(
            num_classes=self.num_classes, arguments=arguments
        )
        model = self.encoder.backbone
        if not isinstance(model, SuperTokenVit):
            raise ConfigError(
                f"svit is a backbone of its own, not a {type(model).__name__}: "
                f"encoder.name={', '.join(PAPER.backbones)}"
            )
        self.reference = partial(
            build.vision,
            num_classes=self.num_classes,
            arguments={**arguments, "super_tokens": [1] * len(model.stages)},
        )

    @classmethod
    def encoder_arguments(cls, cfg: SvitConfig) -> Mapping[str, Any]:
        """What the config sets of the backbone's constructor; null keeps the model's own."""
        by_stage = {
            "super_tokens": cfg.super_tokens,
            "dims": cfg.stage_dims,
            "depths": cfg.stage_depths,
            "heads": cfg.stage_heads,
        }
        given = {name: list(values) for name, values in by_stage.items() if values is not None}
        return {"stem_stride": cfg.stem_stride, **given}

    def class_logits(self, images: Tensor) -> Tensor:
        return self.encoder.classify(self.encoder(images))

    def exports(self) -> tuple[Capability, ...]:
        reduction = SuperTokens(self.encoder, self.reference)
        return Logits(self), EncoderFeatures(self.encoder), reduction


class SuperTokens(AgainstReference):
    """The backbone beside itself with attention on all tokens, and what its super tokens hold."""

    def __init__(self, encoder: VisionEncoder, reference: Callable[[], VisionEncoder]) -> None:
        model = encoder.backbone
        assert isinstance(model, SuperTokenVit)
        self.model = model
        super().__init__(encoder, reference, token_counts(model, encoder.spec.image_size))

    def groups(self, images: Tensor) -> list[tuple[str, Tensor]]:
        """The super token in which each position has its largest share, in the last block of every
        stage that has super tokens; -1 for a share in a neighbour past the border."""
        found: list[tuple[str, Tensor]] = []
        handles = []
        for number, stage in enumerate(self.model.stages, start=1):
            attention: SuperTokenAttention = stage.blocks[-1].attn  # type: ignore[index, union-attr]

            def note(
                module: SuperTokenAttention, inputs: tuple[Tensor], title: str = f"stage {number}"
            ) -> None:
                found.append((title, module.owners(inputs[0])))

            if attention.size > 1:
                handles.append(attention.register_forward_pre_hook(note))  # type: ignore[arg-type]
        try:
            self.encoder(images)
        finally:
            for handle in handles:
                handle.remove()
        return found


def token_counts(model: SuperTokenVit, image_size: int) -> dict[str, list[int]]:
    """Tokens by block: those that attend to each other, and those of the map."""
    attending, on_map = [], []
    side = -(-image_size // model.stem_stride)
    for stage in model.stages:
        for block in stage.blocks:  # type: ignore[union-attr]
            attending.append((-(-side // block.attn.size)) ** 2)  # type: ignore[union-attr]
            on_map.append(side**2)
        side = -(-side // 2)
    return {"attention": attending, "mlp": on_map}


METHOD = Svit
