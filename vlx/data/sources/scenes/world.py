"""What a scene is: solids on a ground plane before a pin-hole camera, in world units.

z is up and the ground is z = 0. The camera's own axes are OpenCV's: x right, y down, z forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

SHAPES = ("cube", "sphere", "cylinder", "cone")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.15, 0.30, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.55, 0.15, 0.70),
    "orange": (0.98, 0.50, 0.05),
    "cyan": (0.10, 0.80, 0.85),
    "brown": (0.42, 0.24, 0.10),
}
SIZES = {"small": 0.45, "large": 0.8}
MATERIALS = ("matte", "shiny", "striped", "checkered")
MOTIONS: dict[str, tuple[float, float]] = {
    "still": (0.0, 0.0),
    "right": (1.2, 0.0),
    "left": (-1.2, 0.0),
    "away": (0.0, 1.2),
    "closer": (0.0, -1.2),
}
"""Way on the ground from time 0 to time 1, (x, y), as the scene's own camera sees it."""

# Of solids of size 1: half the height, the radius on the ground, that of the sphere around the
# middle that holds it.
HALF_HEIGHT = {"cube": 0.8, "sphere": 1.0, "cylinder": 0.9, "cone": 1.0}
FOOTPRINT = {"cube": 0.8 * math.sqrt(2), "sphere": 1.0, "cylinder": 0.8, "cone": 1.0}
BOUND = {
    "cube": 0.8 * math.sqrt(3),
    "sphere": 1.0,
    "cylinder": math.hypot(0.8, 0.9),
    "cone": math.sqrt(2),
}

LEFT, RIGHT, FRONT, BEHIND = "left of", "right of", "in front of", "behind"
INVERSE = {LEFT: RIGHT, RIGHT: LEFT, FRONT: BEHIND, BEHIND: FRONT}
_CLEAR = 0.6  # a relation holds where middles are this much of the two radii apart


@dataclass(frozen=True)
class Camera:
    """Looks at `target` from `distance` away; angles in degrees. Pictures are square."""

    azimuth: float = 0.0
    """0 is the front; 90 stands at the right."""
    elevation: float = 30.0
    distance: float = 8.0
    fov: float = 40.0
    target: tuple[float, float, float] = (0.0, 0.0, 0.5)

    @cached_property
    def pose(self) -> np.ndarray:
        """(4, 4) float64, camera to world: columns are right, down, forward and the position."""
        azimuth, elevation = math.radians(self.azimuth), math.radians(self.elevation)
        back = np.array(
            [
                math.sin(azimuth) * math.cos(elevation),
                -math.cos(azimuth) * math.cos(elevation),
                math.sin(elevation),
            ]
        )
        right = np.array([math.cos(azimuth), math.sin(azimuth), 0.0])
        pose = np.eye(4)
        pose[:3, 0], pose[:3, 1], pose[:3, 2] = right, np.cross(-back, right), -back
        pose[:3, 3] = np.array(self.target) + self.distance * back
        return pose

    @property
    def focal(self) -> float:
        """Focal length in sides of the picture."""
        return 0.5 / math.tan(math.radians(self.fov) / 2)

    def intrinsics(self, side: int) -> np.ndarray:
        """(3, 3) float64, in pixels; the centre of the first pixel is at (0.5, 0.5)."""
        focal = self.focal * side
        return np.array([[focal, 0, side / 2], [0, focal, side / 2], [0, 0, 1.0]])

    def project(self, points: np.ndarray, side: int = 1) -> np.ndarray:
        """Points (N, 3) -> (N, 3) float64: x and y in the picture, depth along the optical axis."""
        local = (np.asarray(points) - self.pose[:3, 3]) @ self.pose[:3, :3]
        screen = local[:, :2] / local[:, 2:] * (self.focal * side) + side / 2
        return np.concatenate([screen, local[:, 2:]], axis=1)


@dataclass(frozen=True)
class Solid:
    """One object, upright on the ground."""

    shape: str
    colour: str
    size: str
    material: str
    x: float
    y: float
    yaw: float
    """Turn about the vertical, radians."""
    motion: str = "still"

    @property
    def scale(self) -> float:
        return SIZES[self.size]

    @property
    def centre(self) -> tuple[float, float, float]:
        return self.x, self.y, HALF_HEIGHT[self.shape] * self.scale

    @property
    def bound(self) -> float:
        """Radius of the sphere about `centre` that holds the solid."""
        return BOUND[self.shape] * self.scale

    @property
    def kind(self) -> str:
        """Colour and shape, which no two objects of a scene share: `red cube`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Relation:
    """`objects[subject]` is `word` `objects[object]`."""

    subject: int
    word: str
    object: int


@dataclass(frozen=True)
class Scene:
    """Objects in order of apparent size: the first is the most prominent."""

    seed: int
    index: int
    objects: tuple[Solid, ...]
    camera: Camera
    ground: float
    """Brightness of the ground, 0..1."""

    def remove(self, k: int) -> Scene:
        """The same scene without `objects[k]`; all else stays as it is."""
        return replace(self, objects=self.objects[:k] + self.objects[k + 1 :])

    def only(self, k: int) -> Scene:
        """The same scene with nothing but `objects[k]`."""
        return replace(self, objects=self.objects[k : k + 1])

    def at(self, time: float) -> Scene:
        """The scene at `time`, where its clip goes from 0 to 1."""
        moved = [
            replace(o, x=o.x + time * MOTIONS[o.motion][0], y=o.y + time * MOTIONS[o.motion][1])
            for o in self.objects
        ]
        return replace(self, objects=tuple(moved))

    def project(self, camera: Camera | None = None, side: int = 1) -> np.ndarray:
        """(K, 4) float64: every object's middle in the picture, its depth, its bound's radius."""
        camera = camera or self.camera
        centres = np.array([o.centre for o in self.objects]).reshape(-1, 3)
        screen = camera.project(centres, side)
        bound = np.array([o.bound for o in self.objects])
        # The outline of a sphere is nearer to the eye than its middle.
        radius = camera.focal * side * bound / np.sqrt(screen[:, 2] ** 2 - bound**2)
        return np.concatenate([screen, radius[:, None]], axis=1)

    def relations(self, camera: Camera | None = None) -> list[Relation]:
        """All that clearly hold as `camera` (the scene's own) sees them: the scene graph's edges.

        Left and right are judged in the picture, front and behind by depth. Two objects of which
        neither is clearly left of the other have no such relation.
        """
        x, _, depth, radius = self.project(camera).T
        bound = np.array([o.bound for o in self.objects])
        found = []
        for i in range(len(self.objects)):
            for j in range(len(self.objects)):
                if i != j and x[j] - x[i] > _CLEAR * (radius[i] + radius[j]):
                    found += [Relation(i, LEFT, j), Relation(j, RIGHT, i)]
                if i != j and depth[j] - depth[i] > _CLEAR * (bound[i] + bound[j]):
                    found += [Relation(i, FRONT, j), Relation(j, BEHIND, i)]
        return found
