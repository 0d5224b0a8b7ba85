"""ALBEF: align before fuse, with momentum distillation (Li et al., NeurIPS 2021).

A ViT and the first half of a BERT encode image and text apart and are aligned by a contrastive
loss (ITC); the second half of the BERT looks at the image and learns which pairs belong together
(ITM, against negatives that the contrast finds alike) and which words are masked (MLM). A moving
average of both encoders gives the candidates of a queue and soft targets for ITC and MLM, since
captions of the web are noisy. `objective: retrieval` is the paper's fine-tuning: ITC and ITM alone,
all candidates of the same image being positives, and negatives of the same image left out.

B batch, L tokens, M image tokens, W text width, E joint width, Q queue, V vocabulary.
Across processes, as in the official code: ITC's candidates are the momentum features of this
process and the queue, which takes those of all processes; ITM's negatives are of this process.
Departures: the teacher moves after an update and not before the next forward, the same but for
steps that are left out; negatives are drawn by Gumbel noise on the logits, the same distribution
without weights that underflow; masked words are averaged over all processes; the texts of ITM are
fused in one pass. The official schedule warms up in jumps of 100 steps and anneals once an epoch,
here both move every step. Pixels are normalised by ImageNet's statistics, which the DeiT that
training starts from was trained with; the official code takes CLIP's. A sample is an image that
shows one of its captions an epoch; the official fine-tuning counts each caption as a sample.
VQA, NLVR2 and visual entailment, further decoders and heads, are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from vlx.blocks.init import normal_init
from vlx.blocks.logit_scale import Temperature
from vlx.blocks.momentum import MomentumCopy
from vlx.blocks.queue import FeatureQueue, RingQueue
from vlx.blocks.word_head import WordHead
from vlx.core.capability import Capability, PairScorer
from vlx.core.errors import ConfigError
from vlx.core.fields import Batch, Needs
from vlx.core.method import Builder, ParamGroup, Trainable, decay_all_but_vectors
from vlx.core.paper import Paper
from vlx.core.step import StepContext, StepOutput
from vlx.encoders.base import EncoderFeatures
from vlx.encoders.checkpoint import fit_positions, load_whole, read_weights
from vlx.encoders.clip_weights import check_tokenizer
from vlx.families.configs.pairs import AlbefViewConfig
from vlx.families.dual_encoder import PAIR_FIELDS, JointSpace, PairTowers, caption_view
from vlx.ops.contrastive import distilled_contrast, hard_negatives
from vlx.ops.dist import global_mean
from vlx.ops.masked_words import choose_words, distilled_words
from vlx.ops.precision import without_autocast
from vlx.ops.text import real_tokens

PAPER = Paper(
    number=36,
    slug="albef",
    title="Align before Fuse: Vision and Language Representation Learning with Momentum "
    "Distillation",
    year=2021,
    venue="NeurIPS",
    url="https://arxiv.org/abs/2107.07651",
    family="alignment",
    commands=("align",),
    modalities=("image", "text"),
    trainable_params=209_937_725,
)


_QUEUES = ("image_queue.", "text_queue.", "positives.")


class Objective(Enum):
    """What is trained for."""

    pretrain = "pretrain"
    retrieval = "retrieval"


@dataclass(kw_only=True)
class AlbefConfig(AlbefViewConfig):
    objective: Objective = Objective.pretrain
    """pretrain: contrast, matching and masked words. retrieval: the first two, where candidates of
    the same image are positives too."""
    embed_dim: int = 256
    """Width of the joint space. Paper section 3.1: 256."""
    fusion_layers: int | None = None
    """Text blocks, the last ones, that look at the image; null takes half. Paper: 6 of 12."""
    temperature: float = 0.07
    """Divides cosines at the start; learned, kept within 0.001 and 0.5. Official code: 0.07."""
    momentum: float = 0.995
    """Share of its weights that the teacher keeps at every step. Paper section 3.5: 0.995."""
    queue_size: int = 65536
    """Momentum features of earlier steps that each side is contrasted with; a multiple of the batch
    and not more than the data has. Paper section 3.5: 65,536."""
    alpha: float = 0.4
    """Weight of the teacher's soft targets, 0..1; 0 trains without distillation. Paper: 0.4."""
    alpha_epochs: float = 1.0
    """Epochs in which that weight rises from 0. Paper section 3.5: 1."""
    mask_ratio: float = 0.15
    """Share of words hidden, 0..1. Paper section 3.2: 0.15."""
    weights: str | None = None
    """A run of albef to start from: retrieval starts from a pre-trained one."""

    def __post_init__(self) -> None:
        for name in ("alpha", "momentum", "mask_ratio", "flip"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"method.{name}={value} must lie in 0..1")


@dataclass
class Encoded:
    """A batch of pairs, each side by itself."""

    image: Tensor
    """(B, M, D) tokens, the class token first."""
    text: Tensor
    """(B, L, W) tokens after the first half of the text encoder."""
    image_vector: Tensor
    """(B, E) of unit length."""
    text_vector: Tensor
    """(B, E) of unit length."""


class AlbefTowers(PairTowers):
    """What has a momentum copy: both encoders, their projections, the head of masked words."""

    def __init__(self, build: Builder, cfg: AlbefConfig) -> None:
        super().__init__(build)
        self.image = build.vision()
        if self.image.spec.num_prefix == 0:
            raise ConfigError(
                "albef reads the class token, and this encoder has none: use a ViT, e.g. "
                "encoder=deit_base_256"
            )
        self.text = build.text(image_dim=self.image.spec.dim, fusion_layers=cfg.fusion_layers)
        dim = self.text.spec.dim
        self.image_projection = nn.Linear(self.image.spec.dim, cfg.embed_dim)
        self.text_projection = nn.Linear(dim, cfg.embed_dim)
        if cfg.objective is Objective.pretrain:
            self.word_head = WordHead(dim, self.text.spec.vocab_size, self.text.eps)
            normal_init(self.word_head)
            if build.load_weights and (published := self.text.word_head_state()):
                self.word_head.load_state_dict(published)

    def encode(self, batch: Batch) -> Encoded:
        image = self.image_tokens(batch["image"])
        text = self.text(batch["text"], batch["text_length"]).tokens
        return Encoded(image, text, self.image_vector(image), self.text_vector(text))

    def image_tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, M, D)."""
        out = self.image(images)
        return torch.cat([out.prefix, out.tokens], dim=1)

    def image_vector(self, tokens: Tensor) -> Tensor:
        return normalize(self.image_projection(tokens[:, 0]).float(), dim=-1)

    def text_vector(self, tokens: Tensor) -> Tensor:
        return normalize(self.text_projection(tokens[:, 0]).float(), dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        return self.image_vector(self.image_tokens(images))

    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.text_vector(self.text(ids, lengths).tokens)

    def word_logits(self, ids: Tensor, lengths: Tensor, image: Tensor) -> Tensor:
        """(B, L, V) of texts whose words are partly hidden, each beside its image."""
        tokens = self.text.fuse(self.text(ids, lengths).tokens, lengths, image)
        return self.word_head(tokens, self.text.token_table.weight).float()


class OwnPair(nn.Module):
    """Pre-training's positives: a sample's own pair, nothing else."""

    def __init__(self, queue_size: int) -> None:
        super().__init__()
        self.queue_size = queue_size

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B,). Returns (B, B + Q) bool, which candidates belong to which sample."""
        count = len(ids)
        return torch.eye(count, count + self.queue_size, dtype=torch.bool, device=ids.device)

    def enqueue(self, ids: Tensor) -> None:
        """Nothing to remember."""


class SameImage(OwnPair):
    """Retrieval's: every candidate of the same image."""

    def __init__(self, queue_size: int) -> None:
        super().__init__(queue_size)
        self.ids = RingQueue(torch.full((1, queue_size), -100))  # no image has this number

    def forward(self, ids: Tensor) -> Tensor:
        return ids[:, None] == torch.cat([ids, self.ids.columns[0]])

    def enqueue(self, ids: Tensor) -> None:
        self.ids.enqueue(ids[:, None])


class MaskedWords(nn.Module):
    """The loss of masked words, the image at hand."""

    def __init__(self, towers: AlbefTowers, mask_ratio: float) -> None:
        super().__init__()
        mask_id = towers.tokenizer.mask_id
        if mask_id is None:
            raise ConfigError(
                f"albef hides words, and {towers.tokenizer.name} has no mask token: use "
                "text.tokenizer=bpe, or the directory of a BERT's"
            )
        self.mask_id, self.mask_ratio = mask_id, mask_ratio

    def forward(
        self,
        batch: Batch,
        student: tuple[AlbefTowers, Tensor],
        teacher: tuple[AlbefTowers, Tensor],
        alpha: float,
        ctx: StepContext,
    ) -> dict[str, Tensor]:
        """student, teacher: towers and the tokens of the images that they made."""
        ids, lengths = batch["text"], batch["text_length"]
        towers, image = student
        may = real_tokens(lengths, ids.shape[1])
        may[:, 0] = False  # the class token
        hidden = choose_words(
            ids,
            may,
            ctx.uniform(ids, 3 * ids.shape[1], "words"),
            mask_ratio=self.mask_ratio,
            vocab_size=towers.text.spec.vocab_size,
        )
        shown = torch.where(hidden.masked, self.mask_id, hidden.ids)
        with torch.no_grad():
            taught = teacher[0].word_logits(shown, lengths, teacher[1])
        per_word = distilled_words(towers.word_logits(shown, lengths, image), taught, ids, alpha)
        chosen = hidden.chosen.float()
        return {"mlm": global_mean((per_word * chosen).sum(), chosen.sum())}


class NoWords(nn.Module):
    """No such loss."""

    def forward(self, *_: object) -> dict[str, Tensor]:
        return {}


class PairLogits(PairScorer):
    """The logit of a match (re-ranking, paper section 4)."""

    def __init__(self, towers: AlbefTowers, head: nn.Linear) -> None:
        self.towers, self.head = towers, head

    def pair_scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        ids, lengths = self.towers.token_ids(texts)
        tokens = self.towers.text(ids, lengths).tokens
        fused = self.towers.text.fuse(tokens, lengths, self.towers.image_tokens(images))
        return self.head(fused[:, 0])[:, 1]


class Albef(Trainable):
    Config = AlbefConfig
    couples_batch = True

    def __init__(self, cfg: AlbefConfig, build: Builder) -> None:
        super().__init__(cfg, build)
        self.towers = AlbefTowers(build, cfg)
        self.temperature = Temperature(cfg.temperature)
        self.match_head = nn.Linear(self.towers.text.spec.dim, 2)
        self.image_queue = FeatureQueue(cfg.embed_dim, cfg.queue_size)
        self.text_queue = FeatureQueue(cfg.embed_dim, cfg.queue_size)
        if cfg.objective is Objective.pretrain:
            self.positives = OwnPair(cfg.queue_size)
            self.words = MaskedWords(self.towers, cfg.mask_ratio)
        else:
            self.positives = SameImage(cfg.queue_size)
            self.words = NoWords()
        self.teacher = MomentumCopy(self.towers, cfg.momentum)
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None
        """Momentum features and numbers of the step's images, for the queues after its update."""
        if cfg.weights is not None and build.load_weights:
            self._start_from(cfg.weights)

    @classmethod
    def needs(cls, cfg: AlbefConfig) -> Needs:
        view = caption_view(cfg.crop_scale, cfg.flip, cfg.rand_augment)
        return Needs(views=(view,), fields=PAIR_FIELDS)

    def step(self, batch: Batch, ctx: StepContext) -> StepOutput:
        numbers = batch["sample_id"]
        if len(numbers) < 2:
            raise ConfigError(
                "albef draws negatives from the batch of a process: train.batch_size must be at "
                "least 2 for each"
            )
        self.image_queue.check(len(numbers))
        alpha = self.alpha(ctx)
        scale, positives = self.temperature(), self.positives(numbers)
        own = self.towers.encode(batch)
        with torch.no_grad():
            taught = self.teacher.module.encode(batch)
        by_image, by_text = self.similarities(own, taught, scale)
        with torch.no_grad():
            soft = self.similarities(taught, taught, scale)
        contrast = (
            distilled_contrast(by_image, soft[0], positives, alpha)
            + distilled_contrast(by_text, soft[1], positives, alpha)
        ) / 2
        match, accuracy = self.matching(
            own, batch["text_length"], (by_image, by_text), positives, ctx
        )
        losses = {"itc": contrast, "itm": match}
        losses |= self.words(
            batch, (self.towers, own.image), (self.teacher.module, taught.image), alpha, ctx
        )
        self.seen = (taught.image_vector, taught.text_vector, numbers)
        metrics = {
            "temperature": 1 / scale.detach(),
            "alpha": torch.full_like(accuracy, alpha),
            "itm_accuracy": accuracy,
        }
        return StepOutput(losses, metrics)

    def alpha(self, ctx: StepContext) -> float:
        """Weight of the teacher's targets, rising over the first epochs."""
        return self.cfg.alpha * min(1.0, ctx.epoch / max(self.cfg.alpha_epochs, 1e-12))

    def similarities(
        self, queries: Encoded, candidates: Encoded, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, B + Q) logits of images against texts, and of texts against images: candidates of
        this process first, then those of the queue."""
        with without_autocast(queries.image_vector):
            texts = torch.cat([candidates.text_vector.T, self.text_queue.columns], dim=1)
            images = torch.cat([candidates.image_vector.T, self.image_queue.columns], dim=1)
            return scale * (queries.image_vector @ texts), scale * (queries.text_vector @ images)

    def matching(
        self,
        own: Encoded,
        lengths: Tensor,
        logits: tuple[Tensor, Tensor],
        positives: Tensor,
        ctx: StepContext,
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy over B pairs and 2B others: every text with another's image, every
        image with another's text."""
        count = len(lengths)
        same = positives[:, :count]
        by_image, by_text = (rows[:, :count] for rows in logits)
        other_texts = hard_negatives(by_image, same, ctx.uniform(lengths, count, "other texts"))
        other_images = hard_negatives(by_text, same, ctx.uniform(lengths, count, "other images"))
        rows = torch.arange(count, device=lengths.device)
        texts = torch.cat([rows, rows, other_texts])
        images = torch.cat([rows, other_images, rows])
        fused = self.towers.text.fuse(own.text[texts], lengths[texts], own.image, images)
        scores = self.match_head(fused[:, 0]).float()  # (3B, 2)
        fits = torch.zeros_like(texts)
        fits[:count] = 1
        accuracy = (scores.detach().argmax(1) == fits).float().mean()
        return cross_entropy(scores, fits), accuracy

    def after_step(self, ctx: StepContext) -> None:
        """The queues take what the step's teacher saw; then the teacher follows."""
        if self.seen is not None:
            images, texts, numbers = self.seen
            self.image_queue.enqueue(images)
            self.text_queue.enqueue(texts)
            self.positives.enqueue(numbers)
            self.seen = None
        self.temperature.clamp()
        self.teacher.update(self.towers)

    def param_groups(self) -> list[ParamGroup]:
        return decay_all_but_vectors(self)

    def exports(self) -> tuple[Capability, ...]:
        return (
            JointSpace(self.towers, self.temperature),
            PairLogits(self.towers, self.match_head),
            EncoderFeatures(self.towers.image),
        )

    def _start_from(self, path: str) -> None:
        """All but the queues, of another objective and image size too."""
        check_tokenizer(self.towers.tokenizer, path)
        own = self.state_dict()
        fresh = {key: own[key] for key in own if key.startswith(_QUEUES)}
        saved = {key: value for key, value in read_weights(path).items() if key in own}
        spec = self.towers.image.spec
        for towers in ("towers", "teacher.module"):
            key = f"{towers}.image.vit.pos_embed"
            fit_positions(own, saved, spec.grid, spec.num_prefix, key)
        load_whole(self, saved | fresh, path)


METHOD = Albef
