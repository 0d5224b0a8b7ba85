"""What the recipe chooses of the data. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Resident(Enum):
    """Whether the decoded images live on the device as uint8."""

    auto = "auto"
    always = "always"
    never = "never"


class Classes(Enum):
    """Which of the classes: CoOp's base-to-new protocol."""

    all = "all"
    base = "base"
    new = "new"


@dataclass(kw_only=True)
class DataConfig:
    source: str = "digits"
    """Kind of source; `vlx data list` shows all."""
    path: str | None = None
    """Folder, file or URL of the data; not needed by embedded sources."""
    train_split: str = "train"
    """Split to train on, in the source's own words."""
    test_split: str = "test"
    """Split to evaluate on, in the source's own words."""
    val_split: str | None = None
    """Split that evaluations during training are on, in the source's own words; null takes the test
    split. Held-out fifths of the training split: train_split=NAME:train, val_split=NAME:test."""
    test_on_train: bool = False
    """Score samples that were trained on, and mark the results; false refuses them."""
    image_column: str = "image"
    """Column (or file extension) that holds the image."""
    label_column: str = "label"
    """Column (or file extension) that holds the label."""
    caption_column: str = "caption"
    """Column (or file extension) that holds the caption, or the list of them."""
    split_column: str | None = None
    """Column whose value decides, by a hash, whether a row is in NAME:train or NAME:test; null
    takes the caption. Folders have the column `file`."""
    variant: str | None = None
    """Which data set of a family of them: the class name for torchvision's data sets."""
    download: bool = False
    """Let torchvision download a data set that is not there."""
    class_names: str | None = None
    """File of class names, a line each in the order that the classes shall have; where they are not
    the data's own, line i names class i, or OWN<tab>NAME. null takes the data's own."""
    shots: int | None = None
    """Train on so many samples of every class; null takes all."""
    classes: Classes = Classes.all
    """all, base (the first half of the classes) or new (the second), of both splits."""
    split_seed: int | None = None
    """Seed that draws the shots; null takes the run's seed."""
    split_file: str | None = None
    """Train on exactly the samples of another run: its split.json."""
    mirror_safe: bool = True
    """Whether captions stay true of a mirrored image; false refuses flips beside captions. For data
    from files: embedded sources know it themselves."""
    resident: Resident = Resident.auto
    """Keep all images on the device: auto does where they have one size and fit."""
    resident_limit_mb: int = 2048
    """The most that `resident: auto` may take, in MiB."""
    repeats: int = 1
    """Times that a sample is augmented in an epoch, in one batch; the epoch keeps its length and
    sees as many times fewer samples (Hoffer 2020). The copies go to different processes where there
    are several, as DeiT's. DeiT: 3."""
    balance_domains: bool = False
    """Every batch holds equally many samples of each domain; smaller domains are gone through more
    often. An unreadable sample's stand-in may be of another domain."""
    workers: int = 2
    """Processes that read and decode, where the data is not resident; 0 reads in the main one."""
    corrupt_limit: float = 0.01
    """Share of unreadable samples, 0..1, past which the run stops."""
    max_pixels: int = 178956970
    """Images with more pixels than this count as unreadable (decompression bombs)."""
    max_side: int | None = 1024
    """Longer images are reduced to this many pixels when they are decoded, so that one huge photo
    does not make a batch huge; null keeps them. Ours."""
