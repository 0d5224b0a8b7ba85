"""Small Hugging Face tokenizers and models in a temporary folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "a small red square left of a large blue circle",
    "a green triangle above two yellow squares",
    "latin capital letter a with grave",
    "a photograph of a dog on a sofa",
]


def wordpiece(folder: Path) -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, `[CLS] words [SEP]`, all special tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special))
    return _save(backend, folder, names)


def byte_bpe(
    folder: Path, *special: str, template: str = "$A", **names: str
) -> PreTrainedTokenizerFast:
    """GPT's kind: byte-level, with the special tokens `special` first and what `names` calls them;
    template: what the tokenizer itself puts around a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    used = [(token, number) for number, token in enumerate(special) if token in template]
    if used:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return _save(backend, folder, names)


def sentence_folder(folder: Path, *steps: tuple[str, dict[str, Any]]) -> None:
    """Adds modules.json and the configs of the steps (kind, config) after the transformer."""
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, (kind, config) in enumerate(steps, start=1):
        path = f"{number}_{kind}"
        modules.append({"path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir(exist_ok=True)
        (folder / path / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(modules))


def _save(backend: Tokenizer, folder: Path, names: dict[str, str]) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer
