"""Causal language models of transformers, fed with vectors: what images are prefixed to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlx.core.errors import ConfigError
from vlx.encoders.config import TextConfig
from vlx.encoders.hf_model import (
    config_of_directory,
    config_of_kind,
    decoder_kinds,
    free_padding_row,
    parameters_of,
    read_model,
)
from vlx.encoders.text import TextSpec
from vlx.ops.decoding import greedy
from vlx.ops.text import pad_in_front


class LanguageModel(nn.Module):
    """A kind by its sizes (`name: llama`) or a local directory with weights.

    `model` is transformers' module with its head. Nothing here stops gradients: with frozen
    weights (`blocks.frozen.Frozen`) they still reach the vectors. `spec.dim` is the width of those
    vectors, `spec.context_length` all places that the model takes, images and text together.

    vocab_size: rows of the token table of a kind; a directory brings its own.
    """

    spec: TextSpec
    directory: str | None
    """Whose weights these are; None for a kind, and once others were loaded."""

    def __init__(self, cfg: TextConfig, vocab_size: int) -> None:
        super().__init__()
        self.name = cfg.name
        kind = cfg.name in decoder_kinds()
        self.model: Any = _new(cfg, vocab_size) if kind else _local(cfg)
        self.directory = None if kind else str(Path(cfg.name).expanduser().absolute())
        self.register_load_state_dict_post_hook(lambda model, _: setattr(model, "directory", None))
        config = self.model.config
        places = config.max_position_embeddings
        if cfg.context_length > places:
            raise ConfigError(
                f"text.context_length={cfg.context_length}, but {cfg.name} takes {places} tokens"
            )
        self.spec = TextSpec(
            dim=self.token_table.embedding_dim,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            vocab_size=self.token_table.num_embeddings,
            context_length=places,
        )
        takes = parameters_of(self.model)
        # The name changed within version 5.
        self._cache = "cache" if "cache" in takes else "past_key_values"
        self._takes_positions = "position_ids" in takes
        self._takes_keep = "logits_to_keep" in takes

    @property
    def token_table(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def embed(self, ids: Tensor) -> Tensor:
        """(B, L) ids to the vectors (B, L, D) that `forward` takes."""
        return self.token_table(ids)

    def forward(self, embeddings: Tensor, real: Tensor, *, first: int = 0) -> Tensor:
        """Logits (B, L - first, V) of the token that follows each place, from place `first` on.

        embeddings: (B, L, D); real: (B, L) bool, False at padding, which is skipped in positions
        and never attended to.
        """
        return self._run(embeddings, real, _positions(real), keep=embeddings.shape[1] - first)[0]

    @torch.no_grad()
    def generate(
        self,
        prefix: Tensor,
        real: Tensor,
        max_new_tokens: int,
        end_id: int,
        choose: Callable[[Tensor], Tensor] = greedy,
    ) -> list[list[int]]:
        """Ids that follow each prefix, up to the end token and without it.

        prefix: (B, L, D) vectors; real: (B, L) bool, False at padding; choose: logits (B, V) to ids
        (B,), e.g. `ops.decoding.Nucleus`. Call it in eval mode: dropout acts otherwise.
        """
        self._check_places(prefix.shape[1] + max_new_tokens)
        x, mask = pad_in_front(prefix, real)  # so that every row goes on at the same place
        positions = _positions(mask)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        cache, drawn = None, []
        for _ in range(max_new_tokens):
            logits, cache = self._run(x, mask, positions, keep=1, cache=cache, use_cache=True)
            ids = choose(logits[:, -1].float()).masked_fill(done, end_id)
            drawn.append(ids)
            done = done | (ids == end_id)
            if bool(done.all()):
                break
            x = self.embed(ids[:, None])
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1
        rows = torch.stack(drawn, dim=1).tolist() if drawn else [[] for _ in prefix]
        return [row[: row.index(end_id)] if end_id in row else row for row in rows]

    def _run(
        self,
        x: Tensor,
        mask: Tensor,
        positions: Tensor,
        *,
        keep: int,
        cache: Any = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any]:
        """Logits of the last `keep` places and the cache of keys and values."""
        self._check_places(mask.shape[1])
        given: dict[str, Any] = {self._cache: cache, "use_cache": use_cache}
        # transformers looks into a mask of two axes, which a tensor without values does not allow.
        given["attention_mask"] = (
            x.new_zeros(len(x), 1, x.shape[1], x.shape[1]) if x.is_meta else mask.long()
        )
        if self._takes_positions:
            given["position_ids"] = positions
        if self._takes_keep:
            given["logits_to_keep"] = keep
        out = self.model(inputs_embeds=x, **given)
        return out.logits[:, -keep:], getattr(out, self._cache) if use_cache else None

    def _check_places(self, count: int) -> None:
        if count > self.spec.context_length:
            raise ConfigError(
                f"images and text are {count} tokens, and text.name={self.name} takes "
                f"{self.spec.context_length}"
            )


def _positions(real: Tensor) -> Tensor:
    """(B, L) bool to the number of real tokens before each (B, L) int64."""
    return (real.long().cumsum(1) - 1).clamp(min=0)


def directory_weights(directory: str) -> dict[str, Tensor]:
    """The state dict of a `LanguageModel` of a local directory. Raises as building it does."""
    return LanguageModel(TextConfig(name=directory, context_length=1), 0).state_dict()


def _new(cfg: TextConfig, vocab_size: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = config_of_kind(cfg, vocab_size)
    model = AutoModelForCausalLM.from_config(config)
    table = model.get_input_embeddings()
    free_padding_row(table, getattr(config, "initializer_range", 0.02))
    return model


def _local(cfg: TextConfig) -> nn.Module:
    from transformers import AutoModelForCausalLM

    folder = Path(cfg.name).expanduser()
    config = config_of_directory(folder, cfg)
    if config.model_type not in decoder_kinds():
        raise ConfigError(
            f"text.name={cfg.name} is a {config.model_type}, not a language model that is known "
            f"here: {', '.join(decoder_kinds())}"
        )
    return read_model(AutoModelForCausalLM, folder, config)
