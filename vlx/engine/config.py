"""The whole configuration of a run. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from vlx.core.errors import ConfigError
from vlx.core.names import check_folder_name
from vlx.data.config import DataConfig
from vlx.encoders.config import EncoderConfig, TextConfig
from vlx.evals.config import EvalConfig
from vlx.track.config import TrackConfig


class Optimizer(Enum):
    adamw = "adamw"
    adam = "adam"
    rmsprop = "rmsprop"
    sgd = "sgd"
    lars = "lars"
    lamb = "lamb"


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    polynomial = "polynomial"
    exponential = "exponential"
    step = "step"
    one_cycle = "one_cycle"
    wsd = "wsd"
    constant = "constant"


class Warmup(Enum):
    """How the rate gets from warmup_lr to its peak."""

    linear = "linear"
    log = "log"
    constant = "constant"


class Per(Enum):
    """How often the schedule moves."""

    step = "step"
    epoch = "epoch"


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Launcher(Enum):
    local = "local"
    torchrun = "torchrun"


class Strategy(Enum):
    """How several processes share a model."""

    ddp = "ddp"
    fsdp = "fsdp"


@dataclass(kw_only=True)
class OptimConfig:
    name: Optimizer = Optimizer.adamw
    """adamw, adam, rmsprop, sgd, lars or lamb."""
    base_lr: float | None = 1.5e-4
    """Learning rate for a batch of 256; the rate used is base_lr x batch_size / 256."""
    lr: float | None = None
    """Absolute learning rate; overrides base_lr."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Moment decays of adamw, adam and lamb."""
    eps: float = 1e-8
    """Added to the root of the second moment of adamw, adam and rmsprop. CLIP: 1e-6."""
    momentum: float = 0.9
    """Of sgd, lars and rmsprop."""
    alpha: float = 0.99
    """Decay of rmsprop's mean square."""
    weight_decay: float = 0.05
    """Decoupled for adamw and lamb, a term of the gradient for the others; none on biases, norms
    and other 1-D tensors."""
    layer_decay: float | None = None
    """Factor on the learning rate from each layer to the one before it, 0..1; null is none. Heads
    and final norms keep the full rate; the patch embedding has the lowest."""
    clip_norm: float | None = None
    """Largest global gradient norm; null does not clip."""

    def __post_init__(self) -> None:
        if self.lr is None and self.base_lr is None:
            raise ConfigError("optim.lr and optim.base_lr are both null: set one")


@dataclass(kw_only=True)
class ScheduleConfig:
    name: Schedule = Schedule.cosine
    """cosine, linear, polynomial, exponential, step, one_cycle, wsd (warm-up, stable, decay) or
    constant."""
    per: Per = Per.step
    """Move every step, or once an epoch to the value of its first step (timm's `t = epoch`)."""
    every_epochs: int = 1
    """per=epoch: epochs of the data that are one of the schedule. ALBEF counts its epochs in pairs:
    5 of COCO's images, each with one of five captions, are one."""
    late_epochs: int = 0
    """per=epoch: epochs by which the rate lags. 1: the first two epochs have the first value (the
    scripts of DeiT and its kin step the schedule with the epoch just ended)."""
    warmup_epochs: float = 0.0
    """Warm-up from warmup_lr, in epochs."""
    warmup_steps: int | None = None
    """Warm-up in steps; overrides warmup_epochs."""
    warmup_lr: float = 0.0
    """Learning rate that warm-up starts from, absolute. Not 0 where `per: epoch` would otherwise
    spend a whole epoch at 0."""
    warmup: Warmup = Warmup.linear
    """linear; log: as the logarithm of the step (DeepSpeed's default); constant: warmup_lr
    throughout (Dassl: CoOp and its kin)."""
    warmup_every: int | None = None
    """Steps between two moves of warm-up; null: as `per` says (ALBEF: 100, by epochs after it)."""
    warmup_prefix: bool = True
    """true: the curve begins where warm-up ends (MAE). false: it begins with the run, and warm-up
    lies over its start (timm: DeiT and its kin)."""
    curve_epochs: float | None = None
    """Length of the curve in epochs. null: to the end of the run. A longer one is cut off by the
    end, after a shorter one its last value stays."""
    curve_steps: int | None = None
    """Length of the curve in steps."""
    curve_share: float | None = None
    """Length of the curve as a multiple of the whole run's. 1.0 with a warm-up in front of it is
    cut off by as much (Dassl)."""
    min_lr: float = 0.0
    """Learning rate at the end of cosine, linear, polynomial and wsd, and the least one of
    exponential; absolute."""
    power: float = 0.9
    """polynomial: power of the share of the curve that is left."""
    milestones: list[float] = field(default_factory=lambda: [0.6, 0.8])
    """step: shares of the run, 0..1, at which the rate is multiplied by gamma."""
    gamma: float = 0.1
    """step: the factor at each milestone; exponential: the factor over gamma_epochs."""
    gamma_epochs: float | None = None
    """Epochs over which exponential falls by gamma, null: one (torch's ExponentialLR); for step,
    epochs between two factors, in place of milestones (StepLR)."""
    decay_share: float = 0.2
    """wsd: share of the run spent decaying, which begins no earlier than warm-up ends."""
    rise_share: float = 0.3
    """one_cycle: share of the run in which the rate rises (torch's OneCycleLR: pct_start)."""
    div_factor: float = 25.0
    """one_cycle: peak over the first rate."""
    final_div_factor: float = 1e4
    """one_cycle: first rate over the last."""
    cycle_momentum: list[float] = field(default_factory=lambda: [0.85, 0.95])
    """one_cycle: momentum (Adam's first beta) at the peak and at both ends, in place of optim's;
    [] leaves it alone."""
    weight_decay_end: float | None = None
    """Weight decay moves to this by a half-cosine over the run; null keeps it."""

    def __post_init__(self) -> None:
        lengths = ("curve_epochs", "curve_steps", "curve_share")
        given = [key for key in lengths if getattr(self, key) is not None]
        if len(given) > 1:
            raise ConfigError(f"schedule.{given[0]} and schedule.{given[1]}: give one of them")
        for key in (*given, "every_epochs", "gamma", "gamma_epochs", "warmup_every", "div_factor"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ConfigError(f"schedule.{key} must be above 0, got {value}")
        for key in ("decay_share", "rise_share"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"schedule.{key} must lie in 0..1, got {getattr(self, key)}")
        if self.cycle_momentum and len(self.cycle_momentum) != 2:
            raise ConfigError("schedule.cycle_momentum must be two numbers or []")
        warms = self.warmup_steps or self.warmup_epochs
        if self.name is Schedule.one_cycle and (given or warms):
            raise ConfigError(
                "schedule=one_cycle rises by itself (rise_share): no warm-up or curve"
            )


@dataclass(kw_only=True)
class TrainConfig:
    epochs: float | None = None
    """Length of the run in epochs; give this or steps."""
    steps: int | None = 100
    """Length of the run in optimizer steps; overrides epochs."""
    batch_size: int = 256
    """Samples of one optimizer step, over all processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches of one step."""
    precision: Precision = Precision.fp32
    """fp32, bf16 or fp16 autocast."""
    compile: bool = False
    """Compile the step with torch.compile."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights; null keeps none."""
    ema_batch: int | None = None
    """Batch size that ema_decay is meant for: the decay used is ema_decay ** (batch_size /
    ema_batch), equal memory in samples. null: ema_decay as it is."""
    swad: str | None = None
    """Average the weights over the valley of this loss, a metric of the evaluations during training
    on data.val_split: classification/loss (SWAD, Cha et al. 2021). null averages none. Keeps one
    more copy of what is trained on the device, and up to seven on the host and in a checkpoint."""
    evaluation_mode: bool = False
    """Train the network in evaluation mode, as several scripts fine-tune: no dropout, no stochastic
    depth, batch norms by the statistics that they have. Mixup and its like stay as they are."""
    sync_batchnorm: bool = False
    """Several processes: batch norms take the statistics of the whole batch, not of a process's
    share of it."""
    device: Device = Device.auto
    """auto takes a GPU where there is one."""
    deterministic: bool = False
    """Only deterministic kernels; an operation without one is an error."""
    log_every: int = 10
    """Steps between records of metrics.jsonl."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; null saves at the end of every epoch, at most once a minute."""
    keep_last: int = 2
    """Checkpoints kept, newest first."""
    keep_best: str | None = None
    """Also keep the checkpoint with the highest value of this evaluation metric; with a minus
    before its name, the lowest (-classification/loss)."""
    max_skipped_steps: int = 3
    """Steps in a row whose loss or gradient is not finite, after which the run stops."""
    adapter: str | None = None
    """Start from what another run trained beside the same frozen model: its directory, or its
    adapter.safetensors."""
    threads: int | None = None
    """CPU threads of a process; null leaves torch's choice, divided over local processes."""

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            raise ConfigError("train.steps and train.epochs are both null: set one")
        for key in ("batch_size", "accumulate", "log_every", "keep_last"):
            if getattr(self, key) < 1:
                raise ConfigError(f"train.{key} must be at least 1, got {getattr(self, key)}")
        if self.swad is not None and self.ema_decay is not None:
            raise ConfigError("train.swad and train.ema_decay both average weights: unset one")


@dataclass(kw_only=True)
class LauncherConfig:
    name: Launcher = Launcher.local
    """local: this process. torchrun: `processes` of them, with torchrun's environment."""
    processes: int = 1
    """Processes on this machine."""
    nodes: int = 1
    """Machines; start the same command on each with its node_rank."""
    node_rank: int = 0
    """This machine's number, from 0."""
    address: str = "127.0.0.1"
    """Address of machine 0."""
    port: int = 0
    """Port on machine 0; 0 picks a free one (one machine only)."""
    strategy: Strategy = Strategy.ddp
    """ddp, or fsdp: parameters sharded over the processes (FSDP2)."""


@dataclass(kw_only=True)
class RunConfig:
    """One run, as `config.yaml` in its directory holds it."""

    command: str = "pretrain-mim"
    """The vlx command."""
    slug: str = "???"
    """The method."""
    preset: str = "tiny"
    """Name of the preset that the run started from."""
    method: Any = None
    """The method's own keys; `vlx show METHOD` lists them."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    teacher: EncoderConfig | None = None
    """A second, frozen encoder, for methods that have one."""
    text: TextConfig | None = None
    """The text side, for methods that read captions: an encoder or a language model."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    seed: int = 0
    """Seed of everything random."""
    runs_dir: str = "runs"
    """Folder in which run directories are made."""
    name: str | None = None
    """Name of the run directory; null makes one from time, method and seed."""

    def __post_init__(self) -> None:
        if self.data.split_seed is None:
            self.data = replace(self.data, split_seed=self.seed)
        if self.name is not None:
            check_folder_name(self.name, "name")
        if self.data.val_split is not None and self.data.val_split == self.data.test_split:
            raise ConfigError(
                f"data.val_split={self.data.val_split} is the test split: see the key"
            )
        if self.train.swad is not None:
            self._check_swad()

    def _check_swad(self) -> None:
        if self.data.val_split is None:
            raise ConfigError(
                "train.swad chooses by held-out samples of the training split: set e.g. "
                f"data.train_split={self.data.train_split}:train "
                f"data.val_split={self.data.train_split}:test"
            )
        if not self.eval.every_steps and not self.eval.every_epochs:
            raise ConfigError("train.swad needs evaluations during training: set eval.every_steps")
        if self.launcher.strategy is Strategy.fsdp:
            raise ConfigError("train.swad keeps whole weights: use launcher.strategy=ddp")
