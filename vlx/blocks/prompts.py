"""Sentences that name classes with places for learned vectors, and prompts deep inside a tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlx.blocks.vit_block import BlockHook
from vlx.core.errors import ConfigError
from vlx.core.text import Tokenizer
from vlx.ops.token_state import TokenState

PLACE = -1
"""Among token ids: the place of a learned vector."""


@dataclass(frozen=True)
class Sentence:
    """`[start] before NAME after ending [end]`: how a class name becomes a text."""

    before: tuple[int, ...]
    """Token ids, or `PLACE`."""
    after: tuple[int, ...] = ()
    ending: str = ""
    """A text that follows the name directly, such as a full stop."""


class ClassTexts(nn.Module):
    """One text a class. C classes, L tokens, M learned vectors.

    ids (C, L) int64, with padding at the places of learned vectors; lengths (C,); slots (C, M): the
    places, ascending. No part of a state dict: another run may have other classes.

    A name that leaves no room is cut and its end token stays, as tokenizers do with any text; `cut`
    has these names. Raises `ConfigError` where there is no room for a single token of a name.
    """

    ids: Tensor
    lengths: Tensor
    slots: Tensor

    def __init__(
        self, tokenizer: Tokenizer, names: Sequence[str], sentence: Sentence, device: torch.device
    ) -> None:
        super().__init__()
        prefix, closing = tokenizer.prefix, _closing(tokenizer)
        around = len(sentence.before) + len(sentence.after)
        room = tokenizer.context_length - len(prefix) - len(closing) - around
        if room < 1:
            raise ConfigError(
                f"text.context_length={tokenizer.context_length} leaves no place for a class name "
                f"beside {around} tokens of a prompt"
            )
        plain = [name.replace("_", " ") for name in names]
        bare = words_of(tokenizer, plain)
        ended = words_of(tokenizer, [name + sentence.ending for name in plain])
        rows = []
        for own, whole in zip(bare, ended, strict=True):
            split = min(len(own), room)
            named, rest = whole[:split], whole[split:room]
            rows.append([*prefix, *sentence.before, *named, *sentence.after, *rest, *closing])
        self.cut = tuple(n for n, whole in zip(names, ended, strict=True) if len(whole) > room)
        lengths = [len(row) for row in rows]
        longest = tokenizer.context_length
        slots = [[i for i, token in enumerate(row) if token == PLACE] for row in rows]
        padded = [
            [tokenizer.pad_id if token == PLACE else token for token in row]
            + [tokenizer.pad_id] * (longest - len(row))
            for row in rows
        ]
        for name, values in (("ids", padded), ("lengths", lengths), ("slots", slots)):
            tensor = torch.tensor(values, dtype=torch.int64, device=device)
            self.register_buffer(name, tensor, persistent=False)

    def __len__(self) -> int:
        return len(self.lengths)


def words_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts without what stands before and behind every text."""
    found, closing = tokenizer.encode(texts), len(_closing(tokenizer))
    start = len(tokenizer.prefix)
    return [
        row[start : length - closing].tolist()
        for row, length in zip(found.ids, found.lengths, strict=True)
    ]


def _closing(tokenizer: Tokenizer) -> list[int]:
    """The end token, or whatever a tokenizer puts behind a text."""
    found = tokenizer.encode([""])
    return found.ids[0, len(tokenizer.prefix) : found.lengths[0]].tolist()


class DeepPrompts(BlockHook):
    """The same `n` tokens exchanged for learned ones before layers 1, 2, ...: what the layer before
    made of them is thrown away, so that the sequence never grows.

    first: place of the first of them; deep: (J - 1, n, D), one row a layer.
    """

    def __init__(self, first: int, deep: Tensor) -> None:
        self.first, self.deep = first, deep

    def before_block(self, state: TokenState, layer: int) -> TokenState:
        if not 1 <= layer <= len(self.deep):
            return state
        x = state.x
        prompts = self.deep[layer - 1].to(x.dtype).expand(len(x), -1, -1)
        behind = self.first + prompts.shape[1]
        return replace(state, x=torch.cat([x[:, : self.first], prompts, x[:, behind:]], dim=1))


class AppendedPrompts(DeepPrompts):
    """Prompts behind all tokens of a ViT, from its first layer to its last, after which they go.

    start: (n, D), as layer 0 sees them; deep: (J - 1, n, D); depth: the layers of the ViT.
    """

    def __init__(self, start: Tensor, deep: Tensor, depth: int) -> None:
        super().__init__(0, deep)  # the place is known when the tokens are
        self.start, self.depth = start, depth

    def before_block(self, state: TokenState, layer: int) -> TokenState:
        if layer:
            return super().before_block(state, layer)
        x = state.x
        self.first = x.shape[1]
        prompts = self.start.to(x.dtype).expand(len(x), -1, -1)
        return replace(state, x=torch.cat([x, prompts], dim=1))

    def after_block(self, state: TokenState, layer: int) -> TokenState:
        if layer + 1 < self.depth:
            return state
        return replace(state, x=state.x[:, : self.first])
