"""Captions that a model writes against those of people, by pycocoevalcap's scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from vlx.core.capability import Captioner
from vlx.core.errors import DataError
from vlx.evals.base import EvalData, Evaluation, Subject
from vlx.evals.pictures import BLACK, GREEN, grid, text_panel, to_picture

MAX_NEW_TOKENS = 32
_ROWS = 8
_PANEL = 460
_SHORTENED = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
_WORD = re.compile(
    r"(?<!\w)n't\b|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,/:]\d+)+|\w+(?:[-'/.]\w+)*|[$€£%&#@+=*<>^~|]"
)


class CaptionQuality:
    """Protocol caption@1: greedy captions of `eval.caption_samples` images spread evenly over the
    test split, at most 32 new tokens, the deterministic central view, against all captions of each
    image.

    BLEU-1 to 4 (of the whole set, closest reference length), ROUGE-L (beta 1.2, mean over
    images) and CIDEr (n-grams of 1 to 4, sigma 6, mean over images; papers often write 100 times
    the value) are those of pycocoevalcap 1.2. CIDEr's document frequencies are those of the
    references of the evaluated set, so that CIDEr of one image is 0. Its tokenizer, Stanford's for
    the Penn Treebank, needs Java, so the words are our own (`words`): lower case, clitics apart,
    punctuation removed. They differ from it in that abbreviations lose their last full stop and
    that brackets go too. References without a word are left out.
    """

    name = "caption"
    version = 1
    requires = (Captioner,)
    needs_labels = False
    needs_captions = True

    @torch.no_grad()
    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        info = data.source("test").info
        written = write_captions(subject.get(Captioner), data)
        every = data.captions("test")
        # A reference of punctuation alone says nothing, and ROUGE would divide by its words.
        references = {index: [t for t in every[index] if words(t)] for index in written}
        references = {index: texts for index, texts in references.items() if texts}
        written = {index: written[index] for index in references}
        if not written:
            raise DataError(f"no image with captions of {info.name} could be read")
        metrics = score_captions(list(written.values()), list(references.values()))
        return Evaluation(
            metrics=metrics,
            units={"cider": "CIDEr, 0..10"},
            split=f"{info.name}/{info.split}",
            num_samples=len(written),
            pictures={"captions": _picture(data, written, references)},
        )


def write_captions(captioner: Captioner, data: EvalData) -> dict[int, str]:
    """By index in the source, ascending, on every process; each writes its share."""
    indices, pipeline = data.spread("test", data.cfg.caption_samples)
    mine: dict[int, str] = {}
    for batch in pipeline.batches():
        if len(batch["sample_id"]) == 0:
            continue
        texts = captioner.captions(batch["image"], MAX_NEW_TOKENS)
        mine |= dict(zip(indices[batch["sample_id"].cpu().numpy()].tolist(), texts, strict=True))
    if data.world > 1:
        gathered: list[Any] = [None] * data.world
        dist.all_gather_object(gathered, mine)
        mine = {index: text for share in gathered for index, text in share.items()}
    return dict(sorted(mine.items()))


def words(text: str) -> str:
    """Lower-case words with one space between them, as the scorers take them.

    As the Penn Treebank has them: "isn't" is "is n't", "dog's" is "dog 's", hyphens and what
    joins digits stay, punctuation goes.
    """
    plain = text.lower().replace("\u2019", "'").replace("cannot", "can not")
    return " ".join(_WORD.findall(_SHORTENED.sub(r" \1", plain)))


def score_captions(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU, ROUGE-L and CIDEr of one caption an image against its one or more references."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses = {row: [words(text)] for row, text in enumerate(written)}
    truth = {row: [words(text) for text in texts] for row, texts in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(truth, hypotheses, verbose=0)
    found = {f"bleu{n}": float(value) for n, value in enumerate(bleu, start=1)}
    found["rouge-l"] = float(Rouge().compute_score(truth, hypotheses)[0])
    found["cider"] = float(Cider().compute_score(truth, hypotheses)[0])
    return found


def _picture(
    data: EvalData, written: dict[int, str], references: dict[int, list[str]]
) -> Image.Image:
    """Images with what the model wrote and the first of what people wrote."""
    indices = list(written)
    places = torch.linspace(0, len(indices) - 1, min(_ROWS, len(indices))).round().long()
    chosen = [indices[place] for place in places]
    rows = []
    for index, image in zip(chosen, data.images("test", chosen)):
        picture = to_picture(image)
        texts = [(written[index], BLACK), (references[index][0], GREEN)]
        rows.append([picture, text_panel(texts, width=_PANEL, height=picture.height)])
    return grid(rows, [(0, "image"), (1, "the model's caption, below it in green a reference")])
