"""From (seed, index) to a scene, by rejection: what is in it can be seen and told apart."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from random import Random

import numpy as np

from vlx.data.sources.scenes.world import (
    COLOURS,
    FOOTPRINT,
    MATERIALS,
    MOTIONS,
    SHAPES,
    SIZES,
    Camera,
    Scene,
    Solid,
)

_DISC = 2.3  # objects' middles stand on a disc of this radius
_TRIES = 40  # places tried for one object before the scene is begun anew
_GAP = 0.1  # between objects on the ground
_RIM = 0.02  # of the picture, free of objects
_SEEN = 0.2  # of the radius: a disc about an object's middle that nothing in front covers
_MAIN_SEEN = 0.85  # the same for the most prominent object
_SECOND = 0.7  # the second object's apparent area, at most, of the first's
# Mean area of the outline over the squared size of the solid, from the default camera.
_AREA = {"cube": 4.2, "sphere": 3.2, "cylinder": 3.55, "cone": 2.6}


@lru_cache(maxsize=4096)
def draw_scene(seed: int, index: int, most: int) -> Scene:
    """The scene `index` of `seed`, with 1 to `most` objects, all visible.

    Only `Random.random` is used: Python promises the same numbers for ever.
    """
    random = Random(f"scenes:{seed}:{index}")
    count = 1 + int(random.random() * most)
    while True:
        camera = Camera(elevation=26 + 12 * random.random())
        ground = 0.55 + 0.3 * random.random()
        scene = Scene(seed, index, (), camera, ground)
        for _ in range(count):
            scene = _add(scene, random) or scene
        if len(scene.objects) == count:
            scene = _by_prominence(scene)
            if _main_is_clear(scene):
                moving = _set_in_motion(scene, random)
                if moving is not None:
                    return moving


def _pick(random: Random, options: tuple[str, ...]) -> str:
    return options[int(random.random() * len(options))]


def _add(scene: Scene, random: Random) -> Scene | None:
    """The scene with one more object; None where no place was found."""
    for _ in range(_TRIES):
        distance, angle = _DISC * math.sqrt(random.random()), 2 * math.pi * random.random()
        solid = Solid(
            shape=_pick(random, SHAPES),
            colour=_pick(random, tuple(COLOURS)),
            size=_pick(random, tuple(SIZES)),
            material=_pick(random, MATERIALS),
            x=distance * math.cos(angle),
            y=distance * math.sin(angle),
            yaw=math.pi / 2 * random.random(),
        )
        if any(solid.kind == other.kind or _touch(solid, other) for other in scene.objects):
            continue
        bigger = replace(scene, objects=(*scene.objects, solid))
        screen = bigger.project()
        if _in_frame(screen[-1]) and _all_seen(screen):
            return bigger
    return None


def _reach(solid: Solid) -> float:
    return FOOTPRINT[solid.shape] * solid.scale


def _touch(a: Solid, b: Solid) -> bool:
    """Whether the two come too near, at any time of the clip."""
    (ax, ay), (bx, by) = MOTIONS[a.motion], MOTIONS[b.motion]
    x, y, vx, vy = a.x - b.x, a.y - b.y, ax - bx, ay - by
    speed = vx * vx + vy * vy
    time = min(1.0, max(0.0, -(x * vx + y * vy) / speed)) if speed else 0.0
    return math.hypot(x + time * vx, y + time * vy) < _reach(a) + _reach(b) + _GAP


def _in_frame(projected: np.ndarray) -> bool:
    x, y, _, radius = projected
    room = radius + _RIM
    return room <= x <= 1 - room and room <= y <= 1 - room


def _all_seen(screen: np.ndarray, share: float = _SEEN, behind: int | None = None) -> bool:
    """Whether no disc of an object in front comes near the middle of one behind it."""
    x, y, depth, radius = screen.T
    apart = np.hypot(x[:, None] - x, y[:, None] - y)
    clear = apart >= radius[:, None] + share * radius  # [front, behind]
    judged = depth[:, None] < depth
    if behind is not None:
        judged[:, np.arange(len(x)) != behind] = False
    return bool(clear[judged].all())


def _by_prominence(scene: Scene) -> Scene:
    area = _areas(scene)
    return replace(scene, objects=tuple(scene.objects[k] for k in np.argsort(-area)))


def _areas(scene: Scene) -> np.ndarray:
    """(K,) apparent areas, up to a factor."""
    full = np.array([_AREA[o.shape] * o.scale**2 for o in scene.objects])
    return full / scene.project()[:, 2] ** 2


def _main_is_clear(scene: Scene) -> bool:
    areas = _areas(scene)
    clear = len(areas) == 1 or areas[1] <= _SECOND * areas[0]
    return clear and _all_seen(scene.project(), _MAIN_SEEN, behind=0)


def _set_in_motion(scene: Scene, random: Random) -> Scene | None:
    """Some objects, one at least, move where they meet nothing; None where none can."""
    objects = list(scene.objects)
    for k in sorted(range(len(objects)), key=lambda _: random.random()):
        moving = any(o.motion != "still" for o in objects)
        if moving and random.random() < 0.5:
            continue
        for motion in sorted([m for m in MOTIONS if m != "still"], key=lambda _: random.random()):
            candidate = replace(objects[k], motion=motion)
            free = not any(_touch(candidate, o) for j, o in enumerate(objects) if j != k)
            if free and _in_frame(replace(scene, objects=(candidate,)).at(1.0).project()[0]):
                objects[k] = candidate
                break
    if all(o.motion == "still" for o in objects):
        return None
    return replace(scene, objects=tuple(objects))
