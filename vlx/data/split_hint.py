"""What to type where a split is not there: something that is, and never what is trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from vlx.data.config import DataConfig


def split_hint(cfg: DataConfig, split: str, found: Iterable[str]) -> str:
    """`Use data.test_split=val`, of the splits that were found; without another, how to make one.

    Neither the training split is proposed for scores, nor what is scored for training.
    """
    trained, scored = {cfg.train_split}, {cfg.test_split, cfg.val_split}
    key, taken = ("train_split", scored) if split in trained else ("test_split", trained)
    if split == cfg.val_split and split != cfg.test_split:
        key = "val_split"
    used = {part for name in taken if name for part in re.split(r"[+:]", name)}
    others = [name for name in found if name not in used | taken and name != split]
    if others:
        near = get_close_matches(split, others, n=1, cutoff=0.4) or others[-1:]
        return f"Use data.{key}={near[0]}"
    if key == "train_split":
        return ""
    whole = cfg.train_split.removesuffix(":train")
    return (
        f"A fifth of the training split can be held out: data.train_split={whole}:train "
        f"data.{key}={whole}:test, with data.split_column=file for files"
    )
