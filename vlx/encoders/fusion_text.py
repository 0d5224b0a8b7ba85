"""A BERT whose last blocks look at an image (ALBEF, Li et al. 2021)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlx.blocks.bert_block import BertBlock, FusionBlock
from vlx.blocks.init import normal_init
from vlx.blocks.vit_block import BlockHook, UnsupportedBlock
from vlx.core.errors import CheckpointError, ConfigError
from vlx.encoders.config import TextConfig
from vlx.encoders.hf_model import config_of_directory, config_of_kind, read_model
from vlx.encoders.sentence_pooling import sentence_layout
from vlx.encoders.text import TextEncoder, TextOut, TextSpec
from vlx.ops.text import real_tokens

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedConfig

log = logging.getLogger("vlx")
_KIND = "bert"
_WIDTH = 768
# Pattern of a published name -> ours.
_BLOCK = r"encoder\.layer\.(\d+)\."
_NAMES = (
    (r"embeddings\.word_embeddings\.(\w+)", r"tokens.\1"),
    (r"embeddings\.position_embeddings\.(\w+)", r"positions.\1"),
    (r"embeddings\.token_type_embeddings\.(\w+)", r"types.\1"),
    (r"embeddings\.LayerNorm\.(\w+)", r"norm.\1"),
    (_BLOCK + r"attention\.output\.dense\.(\w+)", r"blocks.\1.attended.dense.\2"),
    (_BLOCK + r"attention\.output\.LayerNorm\.(\w+)", r"blocks.\1.attended.norm.\2"),
    (_BLOCK + r"crossattention\.self\.query\.(\w+)", r"blocks.\1.query.\2"),
    (_BLOCK + r"crossattention\.output\.dense\.(\w+)", r"blocks.\1.looked.dense.\2"),
    (_BLOCK + r"crossattention\.output\.LayerNorm\.(\w+)", r"blocks.\1.looked.norm.\2"),
    (_BLOCK + r"intermediate\.dense\.(\w+)", r"blocks.\1.fc.\2"),
    (_BLOCK + r"output\.dense\.(\w+)", r"blocks.\1.mixed.dense.\2"),
    (_BLOCK + r"output\.LayerNorm\.(\w+)", r"blocks.\1.mixed.norm.\2"),
)
_JOINED = {
    "attention.self": ("qkv", ("query", "key", "value")),
    "crossattention.self": ("key_value", ("key", "value")),
}
_WORD_HEAD = {
    "transform.dense.weight": "dense.weight",
    "transform.dense.bias": "dense.bias",
    "transform.LayerNorm.weight": "norm.weight",
    "transform.LayerNorm.bias": "norm.bias",
    "bias": "bias",
}
_NEW = ("query", "key_value", "looked")
"""Parts of a block that a published BERT lacks."""


class FusionText(TextEncoder):
    """The first blocks read the text alone, the last `fusion_layers` also look at an image.

    cfg.name: bert, built from the sizes with 512 positions, or a local directory of a BERT, whose
    weights the shared names take; what looks at the image is then new. New weights are N(0, 0.02)
    at BERT's width of 768, wider apart at a smaller one (ours). vocab_size: rows of the token table
    of a new one. image_dim: width of the image's tokens. fusion_layers: blocks that look; None
    takes half of the blocks. `spec.depth` counts all blocks.
    """

    def __init__(
        self, cfg: TextConfig, vocab_size: int, *, image_dim: int, fusion_layers: int | None = None
    ) -> None:
        super().__init__()
        self.name = cfg.name
        named = Path(cfg.name).expanduser()
        folder = None if cfg.name == _KIND else sentence_layout(named).transformer
        config = _config(cfg, vocab_size, folder)
        dim, depth, eps = config.hidden_size, config.num_hidden_layers, config.layer_norm_eps
        self.spec = TextSpec(
            dim, depth, config.num_attention_heads, config.vocab_size, cfg.context_length
        )
        count = depth // 2 if fusion_layers is None else fusion_layers
        if not 1 <= count <= depth:
            raise ConfigError(
                f"method.fusion_layers={count}: the text encoder has {depth} blocks, of which 1 to "
                f"{depth} can fuse (text.depth)"
            )
        self.first_fused = depth - count
        self.eps = eps
        self.tokens = nn.Embedding(config.vocab_size, dim)
        self.positions = nn.Embedding(config.max_position_embeddings, dim)
        self.types = nn.Embedding(config.type_vocab_size, dim)
        self.norm = nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.blocks = nn.ModuleList(
            _block(config, None if i < self.first_fused else image_dim) for i in range(depth)
        )
        # Narrower, 0.02 would leave the class token blind: every text would look alike.
        normal_init(self, 0.02 * (_WIDTH / dim) ** 0.5)
        self.folder, self.config = folder, config
        if folder is not None:
            self._read(folder, config)

    @property
    def token_table(self) -> nn.Embedding:
        return self.tokens

    def layer_depths(self) -> dict[str, int]:
        depths = dict.fromkeys(("tokens", "positions", "types", "norm"), 0)
        return depths | {f"blocks.{i}": i + 1 for i in range(self.spec.depth)}

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor,
        *,
        embeddings: Tensor | None = None,
        layers: Sequence[int] = (),
        hook: BlockHook | None = None,
    ) -> TextOut:
        """The text alone: embeddings and the first blocks; pooled is the class token."""
        if hook is not None:
            raise UnsupportedBlock(
                f"text.name={self.name}: nothing can act inside BERT's blocks. Use text.name=clip"
            )
        x = self.tokens(ids) if embeddings is None else embeddings  # (B, L, D)
        x = x + self.types.weight[0] + self.positions.weight[: x.shape[1]]
        x = self.dropout(self.norm(x))
        real = real_tokens(lengths, x.shape[1])
        taps: dict[int, Tensor] = {}
        for i in range(self.first_fused):
            x = self.blocks[i](x, real)
            if i + 1 in layers:
                taps[i + 1] = x
        return TextOut(tokens=x, pooled=x[:, 0], layers=taps)

    def fuse(
        self, tokens: Tensor, lengths: Tensor, image: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """What the first blocks made of texts, through the last ones, each with its image.

        tokens: (B, L, D); lengths: (B,); image: (R, M, V); rows: (B,) which image each text looks
        at, None where text i looks at image i. Returns (B, L, D).
        """
        real = real_tokens(lengths, tokens.shape[1])
        for i in range(self.first_fused, self.spec.depth):
            tokens = self.blocks[i](tokens, real, image, rows)
        return tokens

    def _read(self, folder: Path, config: PreTrainedConfig) -> None:
        """Weights of a local BERT; those of the look at the image stay."""
        from transformers import AutoModel

        state = bert_state(read_model(AutoModel, folder, config).state_dict())
        report = self.load_state_dict(state, strict=False)
        assert not report.unexpected_keys
        assert all(key.split(".")[2] in _NEW for key in report.missing_keys), report.missing_keys

    def word_head_state(self) -> dict[str, Tensor]:
        """What the published BERT predicts masked words with, under the names of `WordHead`; empty
        where the text is new or its files hold no such head."""
        from transformers import AutoModelForMaskedLM

        if self.folder is None or torch.get_default_device().type == "meta":
            return {}
        try:
            model = read_model(AutoModelForMaskedLM, self.folder, self.config)
        except CheckpointError:  # `_read` has found the rest
            log.info(f"{self.folder} has no head of masked words: it starts new")
            return {}
        head = model.get_submodule("cls.predictions").state_dict()
        return {ours: head[theirs] for theirs, ours in _WORD_HEAD.items()}


def bert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `BertModel` of transformers under the names of `FusionText`, projections of
    attention joined; its pooling layer, which is not used, is left out."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("pooler.") or key.endswith("position_ids"):
            continue
        joined = re.fullmatch(_BLOCK + r"((?:cross)?attention\.self)\.(\w+)\.(\w+)", key)
        if joined and joined[3] in _JOINED[joined[2]][1]:
            number, place, kind = joined[1], joined[2], joined[4]
            name, parts = _JOINED[place]
            stem = f"encoder.layer.{number}.{place}"
            whole = [state[f"{stem}.{part}.{kind}"] for part in parts]
            found[f"blocks.{number}.{name}.{kind}"] = torch.cat(whole)
            continue
        found[_renamed(key)] = value
    return found


def _renamed(key: str) -> str:
    for pattern, ours in _NAMES:
        match = re.fullmatch(pattern, key)
        if match is not None:
            return match.expand(ours)
    return key


def _config(cfg: TextConfig, vocab_size: int, folder: Path | None) -> BertConfig:
    """Sizes of a new BERT, or of the one in a directory."""
    if folder is None:
        config = config_of_kind(cfg, vocab_size)
    else:
        config = config_of_directory(folder, cfg)
    if config.model_type != _KIND or config.hidden_act != "gelu":
        raise ConfigError(
            f"text.name={cfg.name} is a {config.model_type}, and the image is fused inside a BERT "
            "with GELU: use text.name=bert, or the directory of one"
        )
    if cfg.context_length > config.max_position_embeddings:
        raise ConfigError(
            f"text.context_length={cfg.context_length}, but a BERT of {cfg.name} takes "
            f"{config.max_position_embeddings} tokens"
        )
    return config  # type: ignore[return-value]


def _block(config: BertConfig, image_dim: int | None) -> BertBlock:
    sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
    dropout, eps = config.hidden_dropout_prob, config.layer_norm_eps
    if image_dim is None:
        return BertBlock(*sizes, dropout=dropout, eps=eps)
    return FusionBlock(*sizes, image_dim=image_dim, dropout=dropout, eps=eps)
