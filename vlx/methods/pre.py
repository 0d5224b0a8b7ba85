"""PRE: prompt learning with a reparameterisation encoder (Tran et al., 2023).

CoOp's vectors pass through a small network with a skip connection before they stand in the text,
so that they share parameters and depend on one another; the network is dropped after training.

B batch, C classes, M learned vectors, D width of the text tower, E joint width.
Departures: one network for all positions (`separate` of the official code is never trained there,
and its transformer cannot be built); prompts and network stay in fp32, under autocast too; the
LSTM of one layer has no dropout, as in effect there. The schedule is CoOp's (`vlx.methods.coop`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from vlx.blocks.prompts import ClassTexts
from vlx.core.method import Builder
from vlx.core.paper import Paper
from vlx.core.released import Renames, renamed
from vlx.families.configs.clip_tuning import ContextConfig
from vlx.families.context_tuning import ContextTuning
from vlx.ops.precision import without_autocast

PAPER = Paper(
    number=27,
    slug="pre",
    title="PRE: Vision-Language Prompt Learning with Reparameterization Encoder",
    year=2023,
    venue="arXiv",
    url="https://arxiv.org/abs/2309.07760",
    family="clip-tuning",
    commands=("finetune",),
    modalities=("image", "text"),
    trainable_params=1_579_008,
    waive=(("device", "the LSTM asks cuDNN what the GPU can do before it computes anything"),),
)


class Encoder(Enum):
    """The network that the vectors pass through."""

    lstm1 = "lstm1"
    lstm2 = "lstm2"
    mlp1 = "mlp1"
    mlp2 = "mlp2"
    none = "none"


@dataclass(kw_only=True)
class PreConfig(ContextConfig):
    context_init: str | None = "a photo of a"
    """Words whose embeddings the vectors start from, one vector a token; null starts from
    N(0, 0.02^2). Official config: "a photo of a"."""
    encoder: Encoder = Encoder.lstm1
    """lstm1 (published) or lstm2: a bidirectional LSTM over the vectors, of one or two layers;
    mlp1: two linear layers for every vector alone; mlp2: these twice; none: CoOp."""
    bottleneck: int = 64
    """Hidden width of mlp1 and mlp2. Official code: 64."""
    dropout: float = 0.05
    """lstm2: dropout between its layers, 0..1. Official code: 0.05."""
    residual: bool = True
    """Add the vectors to what the network makes of them. Official scripts: true."""


class Recurrent(nn.Module):
    """An LSTM whose time is the vectors: each sees those on both sides. (..., M, D) to itself."""

    def __init__(self, dim: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            dim, dim // 2, layers, bidirectional=True, batch_first=True, dropout=dropout
        )

    def forward(self, context: Tensor) -> Tensor:
        return self.lstm(context.reshape(-1, *context.shape[-2:]))[0].view_as(context)


class Repeated(nn.Module):
    """One network run several times, with the same weights."""

    def __init__(self, inner: nn.Module, times: int) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.inner(x)
        return x


class Residual(nn.Module):
    """A network beside which its input flows on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


def make_encoder(cfg: PreConfig, dim: int) -> nn.Module:
    """The network of width `dim` that a config names, with or without its skip connection."""
    if cfg.encoder is Encoder.none:
        return nn.Identity()
    if cfg.encoder in (Encoder.lstm1, Encoder.lstm2):
        two = cfg.encoder is Encoder.lstm2
        network: nn.Module = Recurrent(dim, 1 + two, cfg.dropout if two else 0.0)
    else:
        layers = nn.Linear(dim, cfg.bottleneck), nn.ReLU(), nn.Linear(cfg.bottleneck, dim)
        network = Repeated(nn.Sequential(*layers), 2 if cfg.encoder is Encoder.mlp2 else 1)
    return Residual(network) if cfg.residual else network


_RELEASED: Renames = (
    (r"^token_(prefix|suffix)$", None),  # of the class names
    (r"^ctx$", "context"),
    (r"^encoder_network\.lstm_head\.", "encoder.lstm."),
    (r"^encoder_network\.module\.([3-9])\.", None),  # mlp2: the same layers once more
    (r"^encoder_network\.module\.", "encoder.inner."),
)


class Pre(ContextTuning):
    Config = PreConfig

    def __init__(self, cfg: PreConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.encoder = make_encoder(cfg, self.towers.text.spec.dim)

    def prompt(self) -> Tensor:
        """The vectors that stand in the text, (M, D) or (C, M, D); no image changes them."""
        with without_autocast(self.context):
            return self.encoder(self.context)

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From those of PRE's released prompts."""
        found = renamed(state, _RELEASED)
        if not isinstance(self.encoder, Residual):
            return found
        return {
            name.replace("encoder.", "encoder.inner.", 1): value for name, value in found.items()
        }

    def text_features(self, image: Tensor, texts: ClassTexts) -> Tensor:
        return self.embed_names(texts, self.prompt())


METHOD = Pre
