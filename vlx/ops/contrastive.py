"""Contrastive losses between two sets of paired vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

from vlx.ops.dist import gather_rows, rank
from vlx.ops.precision import without_autocast


def clip_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The symmetric cross-entropy of CLIP (Radford et al. 2021, figure 3) over all processes.

    images, texts: (B, E) of unit length, this process's pairs; scale: scalar that multiplies
    cosines. Returns the mean over both directions of this process's rows against the columns of
    all; its mean over processes, gradients included, is the loss of the whole batch. One (B, W * B)
    block of logits is held at a time.
    """
    images, texts, scale = images.float(), texts.float(), scale.float()
    first = rank() * len(images)
    by_image = paired_cross_entropy(images, gather_rows(texts), scale, first)
    by_text = paired_cross_entropy(texts, gather_rows(images), scale, first)
    return (by_image + by_text) / 2


def paired_cross_entropy(queries: Tensor, keys: Tensor, scale: Tensor, first: int = 0) -> Tensor:
    """Mean cross-entropy of `scale * queries keysᵀ`, where query i belongs to key `first + i`.

    queries: (B, E), keys: (M, E), float32; scale: scalar. The logits live only in the forward
    pass: what their softmax says of the inputs is worked out there, (B + M) * E numbers.
    """
    return _PairedCrossEntropy.apply(queries, keys, scale, first)  # type: ignore[return-value]


class _PairedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, scale: Tensor, first: int) -> Tensor:  # type: ignore[override]
        with without_autocast(queries):
            logits = queries @ keys.T  # (B, M), cosines until they are scaled
            logits *= scale
            rows = torch.arange(len(queries), device=queries.device)
            places = rows + first
            own = logits[rows, places]
            total = logits.logsumexp(1)
            loss = (total - own).mean()
            if not any(ctx.needs_input_grad[:3]):
                return loss
            weights = (logits - total[:, None]).exp_()  # softmax
            weights[rows, places] -= 1
            weights /= len(queries)
            pulled = weights @ keys  # (B, E): times scale, the gradient of the queries
            ctx.save_for_backward(pulled, weights.T @ queries, queries, scale)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        pulled, pushed, queries, scale = ctx.saved_tensors
        # d loss / d scale = sum of weights * cosines = sum over queries of <pulled, query>
        of_scale = (pulled * queries).sum() * grad
        return pulled * (scale * grad), pushed * (scale * grad), of_scale.reshape(scale.shape), None


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Of 2B vectors, (B, E) twice, each against all others of this process, its own other view
    being the right one (SimCLR, Chen et al. 2020, equation 1)."""
    z = normalize(torch.cat([first, second]).float(), dim=1)
    with without_autocast(z):
        logits = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    pairs = torch.arange(len(z), device=z.device).roll(len(first))
    return cross_entropy(logits.masked_fill(itself, float("-inf")), pairs)


def distilled_contrast(logits: Tensor, taught: Tensor, positives: Tensor, alpha: float) -> Tensor:
    """Cross-entropy against the positives, evenly, mixed with the teacher's softmax (ALBEF, Li et
    al. 2021, equation 6).

    logits, taught: (B, N), of the student's and the teacher's queries; positives: (B, N) bool.
    """
    hard = positives.float()
    hard = hard / hard.sum(1, keepdim=True)
    return cross_entropy(logits, (1 - alpha) * hard + alpha * taught.softmax(1))


def hard_negatives(logits: Tensor, excluded: Tensor, u: Tensor) -> Tensor:
    """One column for each row, drawn with the weights of the row's softmax among those that are
    not excluded: the more alike, the more often (ALBEF, Li et al. 2021, section 3.2).

    logits: (B, N); excluded: (B, N) bool, never drawn; u: (B, N) uniform in [0, 1). Returns (B,)
    int64. Drawn as the largest of the logits plus Gumbel noise, so that no weight can underflow,
    which would leave a row without any. A row that excludes everything gets 0.
    """
    noise = -torch.log(-torch.log(u.clamp(min=2**-25)))
    return (logits.detach().float() + noise).masked_fill(excluded, float("-inf")).argmax(1)


def mean_of_templates(features: Tensor) -> Tensor:
    """Class weights from texts: (C, T, E) of unit length to (C, E) of unit length, the mean over
    templates normalised again."""
    return normalize(features.mean(1), dim=-1)


def late_interaction(
    patches: Tensor, words: Tensor, real: Tensor, *, texts_at_once: int = 32
) -> tuple[Tensor, Tensor]:
    """How well the parts of every image and text fit: relaxed matchings of patches and words.

    patches: (A, N, E), words: (B, M, E), both of unit length; real: (B, M), the words that count.
    Returns (A, B) twice: the mean over patches of each one's best word, and the mean over words of
    each one's best patch (FILIP, Yao et al. 2022, equations 4 and 5). The A * B * N * M
    similarities are held for `texts_at_once` texts at a time, and made again in the backward pass.
    """
    by_patch, by_word = [], []
    for start in range(0, len(words), texts_at_once):
        part = slice(start, start + texts_at_once)
        found = checkpoint(_interaction, patches, words[part], real[part], use_reentrant=False)
        assert isinstance(found, tuple)
        by_patch.append(found[0])
        by_word.append(found[1])
    return torch.cat(by_patch, 1), torch.cat(by_word, 1)


def _interaction(patches: Tensor, words: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    similarity = torch.einsum("ane,bme->abnm", patches, words)
    counted = real.to(similarity.dtype)
    best_word = similarity.masked_fill(~real[:, None], -1.0).amax(3)  # (A, B, N); a cosine's least
    best_patch = similarity.amax(2) * counted  # (A, B, M)
    return best_word.mean(2), best_patch.sum(2) / counted.sum(1).clamp(min=1)
