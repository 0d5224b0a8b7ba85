"""One ray caster for everything: picture, masks, depth, other views, other times.

No shadows and no reflections of other objects: a pixel shows one surface and nothing else, so
taking an object away changes only the pixels that showed it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from vlx.data.sources.scenes.world import COLOURS, HALF_HEIGHT, Camera, Scene, Solid

_LIGHT = np.array([-0.45, -0.55, 0.70]) / math.sqrt(0.45**2 + 0.55**2 + 0.70**2)
_AMBIENT, _DIFFUSE = 0.42, 0.62
_PER_PIXEL = 2  # rays a pixel and direction for the picture's colours
_CELL = 0.8  # of the solid's own units: the checks' side
_BAND = 0.5  # the stripes' width
_SKY = np.array([0.80, 0.88, 0.95])
_TILE = np.array([1.0, 0.99, 0.96])  # tint of the ground
_TILED = 16.0  # depth at which the tiles have faded
_FAR = 40.0  # depth at which the ground has faded into the sky
_GROUND, _NOTHING = -1, -2
_CUBE, _CYLINDER = HALF_HEIGHT["cube"], 0.8  # half the side; the radius


@dataclass(frozen=True)
class Rendering:
    """What a camera sees. K objects in the scene's order, H = W = side pixels."""

    image: np.ndarray
    """(H, W, 3) uint8, two by two rays a pixel."""
    masks: np.ndarray
    """(K, H, W) bool: pixels whose centre shows the object; occluded parts are left out."""
    depth: np.ndarray
    """(H, W) float32 at pixel centres, along the optical axis, world units; inf is the sky."""
    camera: Camera
    time: float = 0.0

    @cached_property
    def boxes(self) -> np.ndarray:
        """(K, 4) int64 x0, y0, x1, y1 of the visible part, x1 and y1 exclusive; 0s if hidden."""
        boxes = np.zeros((len(self.masks), 4), dtype=np.int64)
        for k, mask in enumerate(self.masks):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if len(rows):
                boxes[k] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes


def render(scene: Scene, side: int, camera: Camera | None = None, time: float = 0.0) -> Rendering:
    """The scene at `time` as `camera` (the scene's own) sees it."""
    camera = camera or scene.camera
    scene = scene.at(time)
    owner, depth = _cast(scene, camera, side)
    masks = owner == np.arange(len(scene.objects))[:, None, None]
    return Rendering(picture(scene, side, camera), masks, depth.astype(np.float32), camera, time)


def picture(scene: Scene, side: int, camera: Camera | None = None) -> np.ndarray:
    """(side, side, 3) uint8: the image of `render` alone."""
    camera = camera or scene.camera
    count = side * _PER_PIXEL
    owner, depth = _cast(scene, camera, count)
    rays = _rays(count, camera.focal)
    colour = _ground(scene, camera, rays, depth)
    for k, solid in enumerate(scene.objects):
        seen = owner == k
        if seen.any():
            colour[seen] = _surface(solid, camera, rays[seen], depth[seen])
    parts = [colour[i::_PER_PIXEL, j::_PER_PIXEL] for i, j in np.ndindex(_PER_PIXEL, _PER_PIXEL)]
    mean = np.add.reduce(parts) / len(parts)
    return (mean.clip(0, 1) * 255).round().astype(np.uint8)


@lru_cache(maxsize=8)
def _rays(count: int, focal: float) -> np.ndarray:
    """(count, count, 3) directions in the camera's axes with z = 1: their length is the depth."""
    place = ((np.arange(count) + 0.5) / count - 0.5) / focal
    x, y = np.meshgrid(place, place)
    rays = np.stack([x, y, np.ones_like(x)], axis=-1)
    rays.setflags(write=False)
    return rays


def _cast(scene: Scene, camera: Camera, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, count) int64 number of the object met first, or ground or nothing, and its depth."""
    rays = _rays(count, camera.focal)
    down = rays @ camera.pose[2, :3]
    with np.errstate(divide="ignore"):
        depth = np.where(down < 0, -camera.pose[2, 3] / down, np.inf)
    owner = np.where(np.isfinite(depth), _GROUND, _NOTHING)
    for k, (x, y, _, radius) in enumerate(scene.project(camera, count)):
        # The outline of a ball is an ellipse that is a little longer than its radius.
        reach = 1.2 * radius + 1
        rows = slice(max(0, int(y - reach)), max(0, int(y + reach) + 1))
        columns = slice(max(0, int(x - reach)), max(0, int(x + reach) + 1))
        origin, turn = _into(scene.objects[k], camera)
        met = _HIT[scene.objects[k].shape](origin, rays[rows, columns] @ turn)
        nearer = met < depth[rows, columns]
        depth[rows, columns][nearer] = met[nearer]
        owner[rows, columns][nearer] = k
    return owner, depth


def _into(solid: Solid, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """The camera's position (3,) in the solid's own axes and units, and rays' matrix (3, 3)."""
    turn = _upright(solid.yaw) / solid.scale
    origin = (camera.pose[:3, 3] - np.array(solid.centre)) @ turn
    return origin, camera.pose[:3, :3].T @ turn


def _upright(yaw: float) -> np.ndarray:
    """(3, 3): row vectors of the world times this are in the axes of a solid turned by `yaw`."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]])


# --- where a ray o + t d meets a solid of size 1 about the origin: t, inf where it does not


def _roots(a: np.ndarray, b: np.ndarray, c: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Roots of a t^2 + 2 b t + c, the smaller first where a > 0; nan where there are none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        root = np.sqrt(b * b - a * c)
        return (-b - root) / a, (-b + root) / a


def _slab(o: float, d: np.ndarray, half: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the coordinate enters and leaves [-half, half]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = (-half - o) / d, (half - o) / d
    return np.minimum(one, two), np.maximum(one, two)


def _first(near: np.ndarray, far: np.ndarray) -> np.ndarray:
    """The entry into what lies between `near` and `far`, if that is not empty and ahead."""
    return np.where((near <= far) & (near > 0), near, np.inf)


def _hit_sphere(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    return _first(*_roots((d * d).sum(-1), d @ o, o @ o - 1))


def _hit_cube(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    slabs = [_slab(o[axis], d[..., axis], _CUBE) for axis in range(3)]
    return _first(
        np.maximum.reduce([near for near, _ in slabs]), np.minimum.reduce([far for _, far in slabs])
    )


def _hit_cylinder(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    x, y = d[..., 0], d[..., 1]
    near, far = _roots(x * x + y * y, x * o[0] + y * o[1], o[0] ** 2 + o[1] ** 2 - _CYLINDER**2)
    bottom, top = _slab(o[2], d[..., 2], HALF_HEIGHT["cylinder"])
    return _first(np.maximum(near, bottom), np.minimum(far, top))


def _hit_cone(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The apex is at z = 1; at z = -1 the radius is 1."""
    x, y, z = d[..., 0], d[..., 1], d[..., 2]
    over = 1 - o[2]
    roots = _roots(
        x * x + y * y - z * z / 4,
        x * o[0] + y * o[1] + over * z / 4,
        o[0] ** 2 + o[1] ** 2 - over * over / 4,
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        base = (-1 - o[2]) / z
        round_base = (o[0] + base * x) ** 2 + (o[1] + base * y) ** 2 <= 1
    met = np.where(round_base & (base > 0), base, np.inf)
    for root in roots:
        height = o[2] + root * z
        met = np.where((abs(height) <= 1) & (root > 0) & (root < met), root, met)
    return met


_HIT = {
    "sphere": _hit_sphere,
    "cube": _hit_cube,
    "cylinder": _hit_cylinder,
    "cone": _hit_cone,
}


# --- colours


def _normals(shape: str, p: np.ndarray) -> np.ndarray:
    """Unit vectors (N, 3) at points (N, 3) of the surface, in the solid's axes."""
    if shape == "sphere":
        return p
    if shape == "cube":
        face = np.abs(p).argmax(1)
        return np.eye(3)[face] * np.sign(p)
    out = p * np.array([1, 1, 0]) / np.maximum(np.hypot(p[:, 0], p[:, 1]), 1e-9)[:, None]
    if shape == "cone":
        side = (out + np.array([0, 0, 0.5])) / math.sqrt(1.25)
        return np.where(p[:, 2:] < -1 + 1e-6, np.array([0, 0, -1.0]), side)
    flat = np.abs(p[:, 2:]) > HALF_HEIGHT["cylinder"] - 1e-6
    return np.where(flat, np.array([0, 0, 1.0]) * np.sign(p[:, 2:]), out)


def _surface(solid: Solid, camera: Camera, rays: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Colours (N, 3) where rays (N, 3) meet the solid at depth (N,)."""
    origin, turn = _into(solid, camera)
    p = origin + depth[:, None] * (rays @ turn)
    normal = _normals(solid.shape, p) @ _upright(solid.yaw).T
    colour = np.broadcast_to(np.array(COLOURS[solid.colour]), p.shape)
    inside = p * 0.999  # off the faces, where rounding would draw the lot
    if solid.material == "striped":
        odd = np.floor(inside[:, 2:] / _BAND) % 2 == 1
        colour = np.where(odd, 0.2 * colour + 0.8, colour)
    if solid.material == "checkered":
        odd = np.floor(inside / _CELL).sum(1, keepdims=True) % 2 == 1
        colour = np.where(odd, 0.2 * colour, colour)
    lit = colour * (_AMBIENT + _DIFFUSE * (normal @ _LIGHT).clip(0)[:, None])
    if solid.material != "shiny":
        return lit
    look = rays @ camera.pose[:3, :3].T
    look /= np.linalg.norm(look, axis=1, keepdims=True)
    mirror = look - 2 * (look * normal).sum(1, keepdims=True) * normal
    # A bright sky over dark ground, nearer to the solid's top than to its foot, and the lamp.
    sky = np.clip(0.35 + 0.9 * mirror[:, 2:] + 0.45 * p[:, 2:], 0, 1) ** 2
    lamp = (mirror @ _LIGHT).clip(0)[:, None] ** 24
    return 0.75 * lit + 0.4 * sky + 0.7 * lamp


def _ground(scene: Scene, camera: Camera, rays: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) of the ground where rays (H, W, 3) reach depth (H, W): pale unit tiles."""
    depth = np.minimum(depth, _FAR)
    x, y = (camera.pose[i, 3] + depth * (rays @ camera.pose[i, :3]) for i in range(2))
    odd = (np.floor(x) + np.floor(y)) % 2 == 1
    fade = (depth / _FAR) ** 2
    tile = 1 - 0.05 * odd * np.maximum(0, 1 - depth / _TILED)  # gone before they are too fine
    bright = scene.ground * tile * (1 - fade)
    return np.multiply.outer(bright, _TILE) + np.multiply.outer(fade, _SKY)
