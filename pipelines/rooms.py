"""Rooms with known factors: those of 3D Shapes (Burgess & Kim 2018), drawn instead of downloaded.

Six indices name an image: the hues of floor, walls and object (10 each), the object's scale (8) and shape
(cube, cylinder, sphere, capsule), and the orientation of the room (15, from -30 to 30 degrees).

Only the last three move edges and shadows: they make 480 geometries. White, diffuse light scales the colour
that it meets, so a pixel is a sum of the three colours, each times a weight that the geometry gives. The
weights of all geometries take 6 MB; the images would take 5.9 GB.
"""

import colorsys
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bvae.pipelines.memory_loaders import DeviceLoader

FACTORS = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
SIZES = (10, 10, 10, 8, 4, 15)  # values of each factor
COUNT = math.prod(SIZES)  # all images
GEOMETRIES = math.prod(SIZES[3:])
SIDE = 64  # pixels of an image
RAYS = 4  # along each side of a pixel
FLOOR, WALL, OBJECT = range(3)  # the materials, in the order of their weights

# The scene. Lengths are in radii of the sphere at scale 1; x points right, y up, z from the back wall into
# the room. The object stands on the floor at the origin.
SCALE = (0.75, 1.25)  # the smallest and the largest
TURN = math.radians(30)  # of the camera around the object, to each side
CAMERA = (5.5, 2.7)  # distance from the object's axis, height
TARGET = 1.0  # height of the point in the middle of the picture
VIEW = 0.5  # half the picture's side, at distance 1
WALLS = 3.2  # distance of the back wall and of both side walls
LAMP = (-2.5, 6.0, 3.5)  # its centre
LAMP_SIDE = 2.0  # a square, parallel to the floor: shadows are soft
SATURATION = 0.85  # of the ten hues
AMBIENT = 0.4  # the part of the light that comes from everywhere
CUBE = 0.85  # half the side
CYLINDER = (0.9, 1.8)  # radius, height
CAPSULE = (0.75, 2.4)  # radius, height
REACH = (2.1, 1.4)  # radius and height of the centre of a ball around the largest object of each shape


# --- Names of images --------------------------------------------------------------------------------------
def unravel(number: Tensor) -> Tensor:
    """Numbers [N] among all images, with orientation varying fastest, to indices [N, 6]."""
    return torch.stack(torch.unravel_index(number, SIZES), 1)


def ravel(indices: Tensor) -> Tensor:
    """Indices [N, 6] to numbers [N]."""
    steps = [math.prod(SIZES[k + 1 :]) for k in range(len(SIZES))]
    return (indices * torch.tensor(steps, device=indices.device)).sum(1)


# --- Bodies -----------------------------------------------------------------------------------------------
class Rays(NamedTuple):
    """Points origin + t direction, float64 [3, N]; the origin may be a single column."""

    origin: Tensor
    direction: Tensor

    def scaled(self, factor: float) -> "Rays":
        """The same t, where all lengths are multiplied."""
        return Rays(factor * self.origin, factor * self.direction)


Span = tuple[Tensor, Tensor]  # the t [N] at which rays enter a convex body and leave it; reversed: a miss


def _slab(rays: Rays, axis: int, low: float, high: float) -> Span:
    """The space between two planes."""
    origin, direction = rays.origin[axis], rays.direction[axis]
    ends = (low - origin) / direction, (high - origin) / direction
    return torch.minimum(*ends), torch.maximum(*ends)


def _tube(rays: Rays, radius: float) -> Span:
    """An endless upright cylinder around the origin."""
    (x, _, z), (u, _, w) = rays
    return _inside(u * u + w * w, x * u + z * w, x * x + z * z - radius**2)


def _ball(rays: Rays, radius: float, height: float) -> Span:
    """A ball with its centre at a height above the origin."""
    (x, y, z), (u, v, w) = rays
    y = y - height
    return _inside(u * u + v * v + w * w, x * u + y * v + z * w, x * x + y * y + z * z - radius**2)


def _inside(a: Tensor, b: Tensor, c: Tensor) -> Span:
    """Where a t^2 + 2 b t + c is negative."""
    square = b * b - a * c
    root = torch.where(square > 0, square.clamp(min=0).sqrt(), -math.inf)
    return -(b + root) / a, (root - b) / a


def _common(*spans: Span) -> Span:
    """The intersection of convex bodies."""
    enter, leave = spans[0]
    for other in spans[1:]:
        enter, leave = torch.maximum(enter, other[0]), torch.minimum(leave, other[1])
    return enter, leave


def _first(*spans: Span) -> Tensor:
    """The least t > 0 at which rays that start outside enter one of the bodies; infinity if none."""
    entries = [torch.where((enter > 0) & (enter < leave), enter, math.inf) for enter, leave in spans]
    return torch.stack(entries).amin(0)


def _hit(shape: int, rays: Rays) -> Tensor:
    """The t [N] at which rays meet the object of scale 1, or infinity."""
    if shape == 0:
        upright = _common(_slab(rays, 0, -CUBE, CUBE), _slab(rays, 2, -CUBE, CUBE))
        return _first(_common(upright, _slab(rays, 1, 0, 2 * CUBE)))
    if shape == 1:
        radius, height = CYLINDER
        return _first(_common(_tube(rays, radius), _slab(rays, 1, 0, height)))
    if shape == 2:
        return _first(_ball(rays, 1, 1))
    radius, height = CAPSULE
    low, high = radius, height - radius
    middle = _common(_tube(rays, radius), _slab(rays, 1, low, high))
    return _first(middle, _ball(rays, radius, low), _ball(rays, radius, high))


def _normal(shape: int, point: Tensor) -> Tensor:
    """The unit normals [3, N] at points of the surface of the object of scale 1."""
    x, y, z = point
    if shape == 0:
        from_centre = torch.stack([x, y - CUBE, z])
        side = from_centre.abs().argmax(0, keepdim=True)
        return torch.zeros_like(point).scatter(0, side, from_centre.gather(0, side).sign())
    if shape == 1:
        radius, height = CYLINDER
        on_top = y > height - 1e-9
        x, z = (torch.where(on_top, 0.0, each / radius) for each in (x, z))
        return torch.stack([x, on_top.double(), z])
    radius, height = (1.0, 2.0) if shape == 2 else CAPSULE
    return torch.stack([x, y - y.clamp(radius, height - radius), z]) / radius


# --- Rays -------------------------------------------------------------------------------------------------
class Scene(NamedTuple):
    """What the rays of a picture meet: N = (SIDE * RAYS)^2 of them, row by row."""

    material: Tensor  # int64 [N]
    light: Tensor  # float64 [N], 0 to 1: the factor on the material's colour


class Room(NamedTuple):
    """The floor and the walls, without the object."""

    empty: Scene
    ambient: Tensor  # float64 [N]: the light where the object casts its shadow
    lamp: Tensor  # [3, N]: the point of the lamp that lights what each ray meets
    t: Tensor  # [N]: where each ray ends
    # Of the rays of the picture, and of those from their ends to the lamp: some, and their numbers [M]. All
    # others pass the object at a distance.
    seeing: tuple[Rays, Tensor]
    lighting: tuple[Rays, Tensor]


def empty_room(orientation: int) -> Room:
    """Follow the rays of a picture to the floor and the walls."""
    rays, lamp = _camera(orientation), _lamp()
    # Axis, place, sign of the normal: a ray meets the first of these planes that lies ahead.
    planes = ((1, 0.0, 1.0, FLOOR), (2, -WALLS, 1.0, WALL), (0, -WALLS, 1.0, WALL), (0, WALLS, -1.0, WALL))
    distances = torch.stack([(at - rays.origin[axis]) / rays.direction[axis] for axis, at, *_ in planes])
    t, plane = torch.where(distances > 0, distances, math.inf).min(0)
    axis, _, sign, material = (torch.tensor(column)[plane] for column in zip(*planes, strict=True))
    normal = torch.zeros_like(rays.direction).scatter(0, axis[None], sign.double()[None])
    point = rays.origin + t * rays.direction
    ambient = _ambient(normal)
    empty = Scene(material, ambient + _direct(normal, lamp - point))
    return Room(empty, ambient, lamp, t, _near(rays), _near(Rays(point, lamp - point)))


def _near(rays: Rays) -> tuple[Rays, Tensor]:
    """The rays that come near an object, and their numbers."""
    enter, leave = _ball(rays, *REACH)
    number = ((enter < leave) & (leave > 0)).nonzero().squeeze(1)
    return Rays(rays.origin.expand_as(rays.direction)[:, number], rays.direction[:, number]), number


def furnish(room: Room, scale: int, shape: int) -> Scene:
    """Put the object into a room."""
    size = SCALE[0] + (SCALE[1] - SCALE[0]) * scale / (SIZES[3] - 1)
    (seeing, number), (lighting, lit_number) = room.seeing, room.lighting
    light = room.empty.light.clone()
    shadow = lit_number[_hit(shape, lighting.scaled(1 / size)) < 1]
    light[shadow] = room.ambient[shadow]
    t = _hit(shape, seeing.scaled(1 / size))
    on_object = t < room.t[number]
    seen = number[on_object]
    point = seeing.origin[:, on_object] + t[on_object] * seeing.direction[:, on_object]
    normal = _normal(shape, point / size)
    light[seen] = _ambient(normal) + _direct(normal, room.lamp[:, seen] - point)
    return Scene(room.empty.material.index_fill(0, seen, OBJECT), light)


def _ambient(normal: Tensor) -> Tensor:
    """The light [N] that comes from everywhere, a little more from above."""
    return AMBIENT * (0.85 + 0.15 * normal[1])


def _direct(normal: Tensor, to_lamp: Tensor) -> Tensor:
    """The light [N] that comes from the lamp, by Lambert's law."""
    return (1 - AMBIENT) * ((normal * to_lamp).sum(0) / to_lamp.norm(dim=0)).clamp(min=0)


def _camera(orientation: int) -> Rays:
    """The rays of a picture."""
    angle = TURN * (2 * orientation / (SIZES[5] - 1) - 1)
    distance, height = CAMERA
    origin = torch.tensor([distance * math.sin(angle), height, distance * math.cos(angle)]).double()
    forward = torch.nn.functional.normalize(torch.tensor([0.0, TARGET, 0.0]).double() - origin, dim=0)
    right = torch.tensor([math.cos(angle), 0.0, -math.sin(angle)]).double()
    up = torch.linalg.cross(right, forward)
    steps = VIEW * ((torch.arange(SIDE * RAYS, dtype=torch.float64) + 0.5) * 2 / (SIDE * RAYS) - 1)
    forward, right, up = (axis[:, None, None] for axis in (forward, right, up))
    return Rays(origin[:, None], (forward + steps * right - steps[:, None] * up).flatten(1))


def _lamp() -> Tensor:
    """The point of the lamp that lights what each ray meets, [3, N]; the rays of a pixel have 16 of them.

    Those of neighbouring rays lie apart, so that every part of a pixel sees all of the lamp.
    """
    order = torch.arange(SIDE * RAYS)
    row, column = torch.meshgrid(order % RAYS, order % RAYS, indexing="ij")
    cell = torch.stack([(row + 2 * column) % RAYS, 0 * row, (2 * row + column) % RAYS]).flatten(1)
    side = torch.tensor([[LAMP_SIDE], [0.0], [LAMP_SIDE]], dtype=torch.float64)
    return torch.tensor(LAMP, dtype=torch.float64)[:, None] + side * ((cell + 0.5) / RAYS - 0.5)


# --- All images -------------------------------------------------------------------------------------------
@cache
def all_weights() -> Tensor:
    """The weights of floor, wall and object in each pixel: uint8 [480, 64, 64, 3] of 255ths, on the CPU.

    The geometries are in the order of `unravel`. They are drawn in some seconds, once in a process.
    """
    # One thread of torch per worker: whole pictures in parallel scale better than each operation does.
    pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        drawn = pool.map(weights_of, range(SIZES[5]))
        parts = [*tqdm(drawn, total=SIZES[5], desc="rooms", unit=" orientations", disable=None)]
    finally:  # after an error or Ctrl-C, do not draw what is in the queue
        pool.shutdown(cancel_futures=True)
    return torch.stack(parts, 2).flatten(0, 2)


def weights_of(orientation: int) -> Tensor:
    """The weights of the geometries of one orientation: uint8 [8, 4, 64, 64, 3]."""
    room = empty_room(orientation)
    weights = torch.empty(SIZES[3], SIZES[4], SIDE, SIDE, 3, dtype=torch.uint8)
    for scale, shape in itertools.product(range(SIZES[3]), range(SIZES[4])):
        weights[scale, shape] = _round_together(255 * pixel_weights(furnish(room, scale, shape)))
    return weights


def _round_together(weights: Tensor) -> Tensor:
    """Integers near the weights [..., 3] whose sum is the rounded sum: a white pixel is off by half at most.

    Then the errors of one sign sum to 1 at most, and no colours make a pixel differ by more than 1. Rounded
    alone, three errors of 0.5 would add up.
    """
    low = weights.floor()
    rest = weights - low
    rank = rest.argsort(-1, descending=True).argsort(-1)
    return low + (rank < rest.sum(-1, keepdim=True).round())


def pixel_weights(scene: Scene) -> Tensor:
    """The means over the rays of each pixel: float64 [SIDE, SIDE, 3], 0 to 1."""
    rays = torch.zeros(len(scene.light), 3, dtype=torch.float64)
    rays.scatter_(1, scene.material[:, None], scene.light[:, None])
    return rays.view(SIDE, RAYS, SIDE, RAYS, 3).mean((1, 3))


def colours() -> Tensor:
    """The colours of the hues: uint8 [10, 3]."""
    hues = [colorsys.hsv_to_rgb(hue / SIZES[0], SATURATION, 1) for hue in range(SIZES[0])]
    return (255 * torch.tensor(hues)).round().to(torch.uint8)


class Rooms:
    """All images, on the device that uses them."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.weights = all_weights().to(device)
        self._colours = colours().float().to(device)
        # Constants on the device: a CUDA graph cannot hold a copy from the host.
        self._steps = torch.tensor([SIZES[1] * SIZES[2], SIZES[2], 1], device=device)
        self._hues = torch.tensor(SIZES[:3], device=device)
        self._half = torch.full((), 0.5, device=device)

    def paint(self, numbers: Tensor) -> Tensor:
        """The images with these numbers, int64 [N] of 0 to COUNT - 1 on the device: uint8 [N, 64, 64, 3].

        Only device operations are used, so a CUDA graph can hold them.
        """
        weights = self.weights.index_select(0, numbers % GEOMETRIES).view(-1, SIDE * SIDE, 3).float()
        hues = (numbers // GEOMETRIES)[:, None] // self._steps % self._hues
        # Sums of products of bytes are exact in float32, and in TF32: all devices paint the same pixels.
        pixels = torch.baddbmm(self._half, weights, self._colours[hues], alpha=1 / 255)
        return pixels.to(torch.uint8).view(-1, SIDE, SIDE, 3)


class RoomsLoader(DeviceLoader):
    """Images of `rooms` with these numbers, int64 [N], on the device that uses them; never mirrored."""

    def __init__(self, numbers: Tensor, rooms: Rooms, batch_size: int, seed: int, **options: Any) -> None:
        super().__init__(numbers, batch_size, seed, flip=False, **options)
        self._rooms = rooms

    def batch(self, position: Tensor) -> Tensor:
        """Images [B, 64, 64, 3] of batch `position` of the current epoch; see `DeviceLoader.batch`."""
        return self._rooms.paint(super().batch(position))

    def _fetch(self, indices: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for numbers, index in super()._fetch(indices):
            yield self._rooms.paint(numbers), index
