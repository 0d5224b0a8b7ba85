"""What zero-shot classification calls the classes, and the sentences it puts them into."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from vlx.evals.config import EvalConfig, Templates

log = logging.getLogger("vlx")
_WORDNET_ID = re.compile(r"n\d{8}")


def class_words(class_names: Sequence[str]) -> list[str]:
    """Names as words: underscores to spaces; ImageNet's WordNet ids (`n01440764`, also of a part
    of its classes) to open_clip's name of the same class."""
    if not all(_WORDNET_ID.fullmatch(name) for name in class_names):
        return [name.replace("_", " ") for name in class_names]
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data.imagenet_info import ImageNetInfo

    # The ids in sorted order are ImageNet's standard order, which open_clip's names have.
    words = dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))
    unknown = [name for name in class_names if name not in words]
    if unknown:
        log.warning(f"{len(unknown)} classes are not ImageNet's 1000 and keep ids as names: "
                    f"{', '.join(unknown[:3])}")  # fmt: skip
    return [words.get(name, name) for name in class_names]


def class_texts(names: Sequence[str], cfg: EvalConfig) -> list[list[str]]:
    """The texts of each class: its name in every template, as many for each."""
    if cfg.template_list:
        return [[t.replace("{}", name) for t in cfg.template_list] for name in names]
    if cfg.templates is Templates.none:
        return [[name] for name in names]
    from open_clip import zero_shot_metadata as of_clip

    sets = {
        Templates.simple: of_clip.SIMPLE_IMAGENET_TEMPLATES,
        Templates.imagenet: of_clip.OPENAI_IMAGENET_TEMPLATES,
    }
    return [[template(name) for template in sets[cfg.templates]] for name in names]
