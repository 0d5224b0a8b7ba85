"""Models of transformers by kind and sizes, or from a local directory; nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlx.core.errors import CheckpointError, ConfigError
from vlx.encoders.config import TextConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_HEAD_DIM = 64  # where text.heads is null
# Kinds call the width of the MLP differently; those without any of these derive it from the width.
_MLP_KEYS = ("intermediate_size", "hidden_dim", "ffn_dim")
_SIZES = {"dim": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"}


# Kinds that tests know to hold what `TextEncoder` and `LanguageModel` promise. Others of
# transformers break it silently: FNet, MobileBERT and YOSO let padding change a result.
_ENCODERS = {
    "albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert",
    "electra", "ernie", "gte", "modernbert", "mpnet", "nomic_bert", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
}  # fmt: skip
_DECODERS = {
    "codegen", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode",
    "gpt_neox", "gptj", "granite", "llama", "mistral", "olmo2", "opt", "phi", "phi3", "qwen2",
    "qwen3", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip


def encoder_kinds() -> list[str]:
    """Kinds of the installed transformers that read a text whole, as BERT does."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return sorted(_ENCODERS & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES))


def decoder_kinds() -> list[str]:
    """Kinds of the installed transformers that are causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(_DECODERS & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def config_of_kind(cfg: TextConfig, vocab_size: int, places: int | None = None) -> PreTrainedConfig:
    """The kind's own config with the sizes of `cfg`, an MLP in the kind's own proportion.

    places: positions that it takes; None keeps the kind's own. Raises `ConfigError`.
    """
    from transformers import AutoConfig

    try:
        own = AutoConfig.for_model(cfg.name)
        config = AutoConfig.for_model(cfg.name, **_sizes(own, cfg, vocab_size, places))
        read = [getattr(config, key) for key in _SIZES.values()]
    except Exception as error:  # each kind validates in its own way
        raise ConfigError(f"text.name={cfg.name} takes no such sizes: {_line(error)}") from error
    dim, _, heads = read
    if dim % heads:
        raise ConfigError(f"text.dim={dim} does not divide into text.heads={heads}")
    return config


def _sizes(
    own: PreTrainedConfig, cfg: TextConfig, vocab_size: int, places: int | None
) -> dict[str, Any]:
    """Arguments for the config of `own`'s kind; transformers maps the names to the kind's."""
    dim = cfg.dim or own.hidden_size
    heads = cfg.heads or (max(1, dim // _HEAD_DIM) if cfg.dim else own.num_attention_heads)
    sizes: dict[str, Any] = {
        "hidden_size": dim,
        "num_attention_heads": heads,
        "num_hidden_layers": cfg.depth or own.num_hidden_layers,
        "vocab_size": vocab_size,
    }
    given = own.to_dict()
    for key in _MLP_KEYS:
        if given.get(key):
            sizes[key] = round(given[key] * dim / own.hidden_size)
    if "num_key_value_heads" in given:
        sizes["num_key_value_heads"] = heads  # every head has its own keys
    if given.get("head_dim"):
        sizes["head_dim"] = dim // heads
    if given.get("rotary_dim"):  # GPT-J turns a part of each head
        sizes["rotary_dim"] = min(given["rotary_dim"], dim // heads)
    if places is not None:
        sizes["max_position_embeddings"] = places
    sizes["pad_token_id"] = given.get("pad_token_id")  # some kinds of 5.0 read it and lack it
    for key, value in given.items():  # ids of the kind's own vocabulary
        if key.endswith("_token_id") and isinstance(value, int) and value >= vocab_size:
            sizes[key] = 0 if key == "pad_token_id" else None
    return sizes


def config_of_directory(folder: Path, cfg: TextConfig) -> PreTrainedConfig:
    """The config of a local model. Raises `ConfigError` where `cfg` names other sizes."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"text.name={cfg.name} has no usable config: {_line(error)}") from error
    for key, name in _SIZES.items():
        wanted, found = getattr(cfg, key), getattr(config, name)
        if wanted is not None and wanted != found:
            raise ConfigError(
                f"text.{key}={wanted}, but the model in {cfg.name} has {found}: set text.{key}=null"
            )
    return config


def read_model(auto: Any, folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a local directory with its weights; on the meta device without them.

    auto: `AutoModel` or one of its siblings. Raises `CheckpointError` where weights are missing.
    """
    if torch.get_default_device().type == "meta":
        return auto.from_config(config)
    try:
        with _quiet():
            model, report = auto.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:
        raise CheckpointError(f"cannot read the weights in {folder}: {_line(error)}") from error
    # A pooling layer is not used: many files have none.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        shown = ", ".join(missing[:3])
        raise CheckpointError(f"the weights in {folder} lack {len(missing)} tensors: {shown}")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and its table of unused weights: `report` is read."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def free_padding_row(table: nn.Embedding, deviation: float) -> None:
    """Make every row of a new token table alike: kinds keep one at zero, untrained, for padding,
    and in this run's vocabulary that row may be a word. Padding is masked, whatever its row is."""
    if table.padding_idx is not None:
        with torch.no_grad():
            table.weight[table.padding_idx].normal_(std=deviation)
        table.padding_idx = None


def parameters_of(model: nn.Module) -> set[str]:
    """Names that the model's `forward` takes: they differ by kind and by version."""
    return set(inspect.signature(model.forward).parameters)


def depths_of(model: nn.Module, table: nn.Embedding, depth: int) -> dict[str, int]:
    """Parameter-name prefixes to depth: embeddings 0, block i (from 0) i + 1.

    What the blocks share, such as relative positions, is as near to the input as the embeddings.
    """
    names = {module: name for name, module in model.named_modules()}
    depths = {names[table].split(".")[0]: 0}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            around = name.rpartition(".")[0]
            depths |= {around: 0} if around else {}
            return depths | {f"{name}.{i}": i + 1 for i in range(depth)}
    return depths


def _line(error: Exception) -> str:
    """The first line of another library's message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
