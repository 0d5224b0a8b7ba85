"""Accuracy with only some of the channels of the input."""

from __future__ import annotations

from itertools import combinations

from torch import Tensor

from vlx.core.capability import ChannelSubsets, ClassLogits
from vlx.evals.base import EvalData, Evaluation, Subject
from vlx.evals.classification import count_hits


class ChannelAccuracy:
    """Protocol channels@1: top-1 over all readable samples for every non-empty subset of the C
    channels, 2^C - 1 passes. `m-of-C/top1` is the mean over the subsets of m channels, `mean/top1`
    the mean over all subsets, `only-0+2/top1` that of one subset."""

    name = "channels"
    version = 1
    requires = (ChannelSubsets,)
    needs_labels = True
    needs_captions = False

    def run(self, subject: Subject, data: EvalData) -> Evaluation:
        model, info = subject.get(ChannelSubsets), data.source("test").info
        total, metrics, every = model.num_channels, {}, []
        count = 0
        for size in range(total, 0, -1):
            found = []
            for channels in combinations(range(total), size):
                chosen = _Subset(model, channels)
                hits = count_hits(chosen, data.pipeline("test"), info.num_classes)
                count = int(hits[:, 2].sum())
                found.append(float(hits[:, 0].sum()) / count)
                if size < total:
                    metrics[f"only-{'+'.join(map(str, channels))}/top1"] = found[-1]
            metrics[f"{size}-of-{total}/top1"] = sum(found) / len(found)
            every += found
        metrics["mean/top1"] = sum(every) / len(every)
        return Evaluation(metrics, split=f"{info.name}/{info.split}", num_samples=count)


class _Subset(ClassLogits):
    """A classifier that sees some channels."""

    def __init__(self, model: ChannelSubsets, channels: tuple[int, ...]) -> None:
        self.model, self.channels = model, channels

    def class_logits(self, images: Tensor) -> Tensor:
        return self.model.subset_logits(images, self.channels)
