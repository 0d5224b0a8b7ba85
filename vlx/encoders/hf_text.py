"""BERT, RoBERTa, MPNet and their kin of transformers as a `TextEncoder`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlx.blocks.vit_block import BlockHook, UnsupportedBlock
from vlx.core.errors import ConfigError
from vlx.encoders.config import TextConfig
from vlx.encoders.hf_model import (
    config_of_directory,
    config_of_kind,
    depths_of,
    encoder_kinds,
    free_padding_row,
    read_model,
)
from vlx.encoders.sentence_pooling import Pooling, pooling_of, sentence_layout
from vlx.encoders.text import TextEncoder, TextOut, TextSpec
from vlx.ops.text import real_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class HfText(TextEncoder):
    """A kind by its sizes (`name: bert`) or a local directory with weights.

    `pooled` is the class token, or what a sentence-transformers directory says (class token, mean,
    maximum, dense layers; not its scaling to unit length). `model` is transformers' module; its
    parameter names are the published ones. `layers[depth]` is before the final norm only where
    transformers' hidden states are: BERT's kin have no final norm.

    vocab_size: rows of the token table of a kind; a directory brings its own.
    """

    def __init__(self, cfg: TextConfig, vocab_size: int) -> None:
        super().__init__()
        self.name = cfg.name
        if cfg.name in encoder_kinds():
            self.model = _new(cfg, vocab_size)
            self.pooling = Pooling()
        else:
            layout = sentence_layout(Path(cfg.name).expanduser())
            self.model = _local(cfg, layout.transformer)
            self.pooling = pooling_of(layout)
        config = self.model.config
        self.spec = TextSpec(
            dim=config.hidden_size,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            vocab_size=self.token_table.num_embeddings,
            context_length=cfg.context_length,
        )

    @property
    def token_table(self) -> nn.Embedding:
        """Its rows are narrower than D where the kind widens them afterwards (ALBERT, ELECTRA)."""
        table = self.model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table

    @property
    def pooled_dim(self) -> int:
        return self.pooling.dim(self.spec.dim)

    def layer_depths(self) -> dict[str, int]:
        depths = depths_of(self.model, self.token_table, self.spec.depth)
        return {f"model.{prefix}": depth for prefix, depth in depths.items()}

    def forward(
        self,
        ids: Tensor,
        lengths: Tensor,
        *,
        embeddings: Tensor | None = None,
        layers: Sequence[int] = (),
        hook: BlockHook | None = None,
    ) -> TextOut:
        if hook is not None:
            raise UnsupportedBlock(
                f"text.name={self.name}: nothing can act inside the blocks of "
                f"{type(self.model).__name__}. Use text.name=clip"
            )
        # Vectors and not ids, always: RoBERTa would count positions by which ids are its padding.
        x = self.token_table(ids) if embeddings is None else embeddings  # (B, L, D)
        real = real_tokens(lengths, x.shape[1])
        out = self.model(
            inputs_embeds=x,
            # transformers looks into the mask, which a tensor of shapes only does not allow.
            attention_mask=None if x.is_meta else real.long(),
            output_hidden_states=bool(layers),
        )
        tokens = out.last_hidden_state
        taps = {n: out.hidden_states[n] for n in layers if 0 < n <= self.spec.depth}
        return TextOut(tokens=tokens, pooled=self.pooling(tokens, real), layers=taps)


def _new(cfg: TextConfig, vocab_size: int) -> PreTrainedModel:
    from transformers import AutoModel

    config = config_of_kind(cfg, vocab_size, cfg.context_length)
    with torch.device("meta"):
        offset = _position_offset(AutoModel.from_config(config))
    config.max_position_embeddings = cfg.context_length + offset
    model = AutoModel.from_config(config)
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    free_padding_row(table, config.initializer_range)
    return _without_pooler(model)


def _local(cfg: TextConfig, folder: Path) -> PreTrainedModel:
    from transformers import AutoModel

    config = config_of_directory(folder, cfg)
    if config.model_type not in encoder_kinds():
        raise ConfigError(
            f"text.name={cfg.name} is a {config.model_type}, not a text encoder that is known "
            f"here: {', '.join(encoder_kinds())}"
        )
    model = _without_pooler(read_model(AutoModel, folder, config))
    places = _places(model, config)
    if cfg.context_length > places:
        raise ConfigError(
            f"text.context_length={cfg.context_length}, but the model in {cfg.name} takes {places} "
            "tokens"
        )
    return model


def _without_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """Without the layer that BERT pre-trained its sentence pairs with: nothing here uses it."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]
    return model


def _position_table(model: nn.Module) -> nn.Embedding | None:
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module
    return None


def _position_offset(model: nn.Module) -> int:
    """Rows of the position table that no token has: RoBERTa's kin start after the padding's."""
    table = _position_table(model)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def _places(model: nn.Module, config: PreTrainedConfig) -> int:
    """Tokens that the model takes."""
    table = _position_table(model)
    rows = config.max_position_embeddings if table is None else table.num_embeddings
    return rows - _position_offset(model)
