"""Pictures of simple solids with captions, and all that is true of them, drawn when read."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from vlx.core.errors import DataError
from vlx.data.config import DataConfig
from vlx.data.content import code_digest, combined
from vlx.data.noise import swapped
from vlx.data.overlap import image_digests
from vlx.data.source import Sample, SourceInfo
from vlx.data.sources.scenes.draw import draw_scene
from vlx.data.sources.scenes.questions import Question, questions
from vlx.data.sources.scenes.render import Rendering, picture, render
from vlx.data.sources.scenes.words import captions
from vlx.data.sources.scenes.world import COLOURS, SHAPES, Camera, Scene
from vlx.data.variant import check_range, parse_variant

_TEST_FROM = 1 << 40  # the test split's scenes are numbered from here
_AROUND = 1.25  # distance of the other views' cameras over that of the scene's own


@dataclass(frozen=True)
class Variant:
    """`data.variant`: e.g. `n=4000,side=64,objects=6`."""

    n: int = 4000
    """Scenes of the training split."""
    test: int = 1000
    """Scenes of the test split."""
    side: int = 64
    """Pixels of a picture's side."""
    objects: int = 6
    """Most objects of a scene, 1..6; the fewest is 1."""
    seed: int = 0
    """Another seed is another set of scenes."""
    noise: float = 0.0
    """Share of the training scenes whose captions are swapped among them, 0..1."""


class Scenes:
    """Splits `train`, `test` and `all`, of different scenes.

    A scene is a pure function of (seed, number). The label is the most prominent object's colour
    and shape (32 classes), the object that the captions name first. Everything else that is known
    of a sample comes from `scene`, `render`, `views`, `clip` and `questions`.
    """

    def __init__(self, cfg: DataConfig, split: str) -> None:
        options = parse_variant(cfg.variant, Variant())
        for key, low, high in (
            ("n", 1, _TEST_FROM),
            ("test", 1, _TEST_FROM),
            ("side", 32, 1024),
            ("objects", 1, 6),
            ("noise", 0, 1),
        ):
            check_range(key, getattr(options, key), low, high)
        parts = {
            "train": [np.arange(options.n)],
            "test": [np.arange(options.test) + _TEST_FROM],
        }
        parts["all"] = [*parts["train"], *parts["test"]]
        if split not in parts:
            raise DataError(f"scenes has no split '{split}': use train, test or all")
        if split != "train":
            options = replace(options, noise=0.0)
        self.options = options
        self._numbers = np.concatenate(parts[split])
        self._caption_of = swapped(len(self._numbers), options.noise, options.seed)
        self.info = SourceInfo(
            name="scenes",
            split=split,
            num_samples=len(self._numbers),
            fields=("image", "label", "caption"),
            class_names=tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
            fingerprint=self._fingerprint(split),
            mirror_safe=False,
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> Sample:
        return {
            "image": picture(self.scene(index), self.options.side),
            "label": self._label(index),
            "caption": self.captions(index),
        }

    def captions(self, index: int) -> list[str]:
        """Three texts: terse, medium, full."""
        return captions(self.scene(int(self._caption_of[index])))

    def describe(self, index: int) -> str:
        return f"scene {self._numbers[index]} of seed {self.options.seed}"

    def labels(self) -> np.ndarray:
        return np.array([self._label(index) for index in range(len(self))], dtype=np.int64)

    def contents(self) -> np.ndarray:
        """(N, 32) uint8: a digest for each scene, of what its picture is a function of."""
        words = f"{self.options.seed} {self.options.objects} {self.options.side}"
        return image_digests(f"{words} {number}".encode() for number in self._numbers.tolist())

    def scene(self, index: int) -> Scene:
        """The objects, their attributes and places, the relations and the camera of a sample."""
        return draw_scene(self.options.seed, int(self._numbers[index]), self.options.objects)

    def render(self, scene: Scene, camera: Camera | None = None, time: float = 0.0) -> Rendering:
        """Image, masks, boxes and depth of a scene at the source's size."""
        return render(scene, self.options.side, camera, time)

    def views(self, index: int, n: int) -> list[Rendering]:
        """A scene from n cameras around it, poses in `camera.pose`.

        The first is the scene's own; the others stand farther away, so that what was far off and
        is now near fits the picture.
        """
        scene = self.scene(index)
        away = replace(scene.camera, distance=_AROUND * scene.camera.distance)
        around = [replace(away, azimuth=360 * k / n) for k in range(1, n)]
        return [self.render(scene, camera) for camera in (scene.camera, *around)]

    def clip(self, index: int, frames: int) -> list[Rendering]:
        """A scene at times 0 to 1, evenly: one object at least moves, and none meets another."""
        times = np.linspace(0, 1, frames).tolist()
        return [self.render(self.scene(index), time=time) for time in times]

    def questions(self, index: int) -> list[Question]:
        return questions(self.scene(index))

    def _fingerprint(self, split: str) -> str:
        """Digest of what a scene is a function of; the first one tells what libraries change."""
        code = code_digest(*sorted(Path(__file__).parent.glob("*.py")))
        first = picture(self.scene(0), self.options.side)
        words = [code, split, str(astuple(self.options)), *self.captions(0)]
        return combined([*words, first.tobytes()])

    def _label(self, index: int) -> int:
        first = self.scene(index).objects[0]
        return list(COLOURS).index(first.colour) * len(SHAPES) + SHAPES.index(first.shape)
