"""A picture: originals, what the model saw, what it repainted, and nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlx.core.capability import ImageFeatures, Reconstruction
from vlx.core.step import StepContext
from vlx.evals.base import EvalData, Evaluation, Subject
from vlx.evals.pictures import grid, to_picture

_ROWS = 8
_NEIGHBOURS = 5
_POOL = 20_000
_MASK_SEED = 0


class ReconstructionGrid:
    """Protocol reconstruction@1: eight test images spread evenly over the split, masks of a fixed
    seed. Every process computes it whole, so it is the same for any number of them."""

    name = "reconstruction"
    version = 1
    requires = (Reconstruction,)
    needs_labels = False
    needs_captions = False

    @torch.no_grad()
    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        chosen = torch.cat([batch["image"] for batch in data.sample("test", _ROWS)])
        ctx = StepContext(step=0, total_steps=1, steps_per_epoch=1, seed=_MASK_SEED)
        seen, painted = subject.get(Reconstruction).reconstruct(chosen, ctx)
        rows = [[to_picture(x) for x in row] for row in zip(chosen, seen, painted)]
        titles = [(0, "original"), (1, "masked"), (2, "reconstruction")]
        if subject.has(ImageFeatures):
            for row, found in zip(rows, neighbours(subject, data, chosen)):
                row.extend(to_picture(x) for x in found)
            titles.append((3, "nearest neighbours in the training split"))
        mse = (painted - chosen).square().mean().item()
        info = data.source("test").info
        return Evaluation(
            metrics={"mse": mse},
            unit="squared error, RGB 0..1",
            split=f"{info.name}/{info.split}",
            num_samples=len(chosen),
            pictures={"reconstruction": grid(rows, titles, gap_before=3)},
        )


def neighbours(subject: Subject, data: EvalData, queries: Tensor) -> list[Tensor]:
    """The training images (of 20,000 at most) nearest to each query by cosine."""
    encoder = subject.get(ImageFeatures)
    query = normalize(encoder.image_features(queries), dim=1)
    best = torch.full((len(queries), 0), 0.0, device=query.device)
    pool = torch.zeros(len(queries), 0, *queries.shape[1:], device=query.device)
    for batch in data.sample("train", _POOL):
        similarity = query @ normalize(encoder.image_features(batch["image"]), dim=1).T
        top, index = similarity.topk(min(_NEIGHBOURS, similarity.shape[1]), dim=1)
        best, pool = torch.cat([best, top], 1), torch.cat([pool, batch["image"][index]], 1)
        order = best.topk(min(_NEIGHBOURS, best.shape[1]), dim=1).indices
        best = best.gather(1, order)
        pool = torch.stack([images[o] for images, o in zip(pool, order)])
    return list(pool)
