"""DeiT's RandAugment and random erasing on 128 images at 224 against timm's, which uses PIL.

Both begin with decoded uint8 images and end with normalised float tensors; one process and one
thread each, timm's loader would run several. `python -m benchmarks.augment`.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing as TimmErasing
from torchvision import transforms

from benchmarks.measure import Row, alternate
from vlx.core.fields import ViewSpec
from vlx.data.views import make_views
from vlx.ops.augment import IMAGENET_MEAN, IMAGENET_STD, RandomErasing
from vlx.ops.rand_augment import RandAugment

BATCH, SIDE = 128, 224
ROUNDS = 7


def photos() -> np.ndarray:
    """(B, H, W, 3) uint8: smooth fields with some noise, so that no operation is trivial."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (BATCH, 14, 14, 3), np.uint8)
    large = [np.asarray(Image.fromarray(c).resize((SIDE, SIDE), 3), np.int16) for c in coarse]
    noisy = np.stack(large) + rng.integers(-8, 9, (BATCH, SIDE, SIDE, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def main() -> list[Row]:
    """Medians over alternating rounds of one batch each; prints images/s of both."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    arrays = photos()
    pictures = [Image.fromarray(array) for array in arrays]
    batch = torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()
    sizes = torch.tensor([SIDE, SIDE]).expand(BATCH, 2)
    views = (ViewSpec("image", ops=(RandAugment(), RandomErasing())),)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    rounds = iter(range(1_000_000))

    def ours() -> None:
        keys = torch.arange(BATCH) + BATCH * next(rounds)  # other draws every round
        (make_views(batch, sizes, keys, views, SIDE)["image"] - mean).div_(std)

    settings = {
        "img_mean": tuple(round(255 * value) for value in IMAGENET_MEAN),
        "interpolation": Image.Resampling.BICUBIC,
        "magnitude_max": 9.99,  # 10 posterises to 0 bits, which Pillow 13 refuses
    }
    theirs = transforms.Compose(
        [
            rand_augment_transform("rand-m9-mstd0.5-inc1", settings),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            TimmErasing(0.25, mode="pixel", device="cpu"),
        ]
    )

    def peer() -> None:
        torch.stack([theirs(picture) for picture in pictures])

    our_time, their_time = alternate(ours, peer, rounds=ROUNDS)
    row = Row(
        name=f"RandAugment and erasing, {BATCH} at {SIDE}",
        ours=BATCH / our_time,
        peer=BATCH / their_time,
        unit="images/s",
        peer_name="timm on PIL, 1 process",
        target="none",
    )
    print(f"vlx {row.ours:,.0f} images/s, timm {row.peer:,.0f}: {row.ratio:.2f} x")
    return [row]


if __name__ == "__main__":
    main()
