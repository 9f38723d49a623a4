"""2D shapes with known factors: the images of dSprites (Matthey et al. 2017), drawn instead of downloaded.

Five indices name an image: shape (square, ellipse, heart), scale (0.5 to 1), orientation (0 to a full
turn, both ends, so the last equals the first), x and y (left to right, top to bottom). A pixel is 1 if its
centre lies inside the shape; nothing is antialiased.

The shapes' sizes were fitted to 320 frames of the original, from which the drawing differs in 8 of 1 310 720
pixels: one pixel and its mirror image, at the edge of one heart that is shown four times.
"""

import contextlib
import errno
import math
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bvae import disk, files
from bvae.errors import UsageError
from bvae.opening import open_regular
from bvae.owner import wait
from bvae.paths import expand
from bvae.pipelines.cache import lock_of, other_owner
from bvae.pipelines.packed_loader import pack

FACTORS = ("shape", "scale", "orientation", "x", "y")
SIZES = (3, 6, 40, 32, 32)  # values of each factor
COUNT = math.prod(SIZES)  # all images
TURN = SIZES[2] - 1  # orientations in a full turn
SIDE = 64  # pixels of an image
PACKED = SIDE * SIDE // 8  # bytes of an image of one bit per pixel
FILE = "sprites-1.bin"  # all images, one bit per pixel, and a checksum; the 1 changes with the drawing
CHECKSUM = 4  # bytes, CRC-32

# At scale 1, in pixels.
SQUARE = 9.598  # half the side
ELLIPSE = (12.766, 7.2135)  # semi-axes: across and up, at orientation 0
HEART = (9.5938, 0.6622, 1.4363)  # half the width, the stretch upwards, the shift upwards

WINDOW = 29  # pixels: covers 13.6 on either side of a shape's centre, at any position within a pixel
CHUNK = 256  # images drawn at a time: their intermediate results fit into a core's cache
BLOCK = 16 * CHUNK  # images that a worker draws at a time


# --- Names of images --------------------------------------------------------------------------------------
def unravel(number: Tensor) -> Tensor:
    """Numbers [N] among all images, with y varying fastest, to indices [N, 5]."""
    columns = []
    for size in reversed(SIZES):
        columns.append(number % size)
        number = number // size
    return torch.stack(columns[::-1], 1)


# --- Drawing ----------------------------------------------------------------------------------------------
def render(indices: Tensor) -> Tensor:
    """Draw the images that integer indices [N, 5] name: uint8 [N, 64, 64] of 0 and 1, on their device.

    Raises:
        ValueError: not a tensor of that shape and type, or an index out of its range.
    """
    if indices.dim() != 2 or indices.shape[1] != len(SIZES) or indices.dtype not in _INTEGERS:
        raise UsageError(
            f"indices must be integers [N, {len(SIZES)}] ({', '.join(FACTORS)}), "
            f"got {indices.dtype} {list(indices.shape)}"
        )
    sizes = torch.tensor(SIZES, device=indices.device)
    outside = (indices < 0) | (indices >= sizes)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise UsageError(
            f"indices[{row}]: {FACTORS[column]} must be 0 to {SIZES[column] - 1}, got {indices[row, column]}"
        )
    images = torch.zeros(len(indices), SIDE * SIDE, dtype=torch.uint8, device=indices.device)
    for shape, inside in enumerate((_in_square, _in_ellipse, _in_heart)):
        rows = (indices[:, 0] == shape).nonzero().squeeze(1)
        for chunk in rows.split(CHUNK):
            drawn, pixel_index = _draw(inside, indices[chunk].long())
            images[chunk] = torch.zeros_like(images[chunk]).scatter_(1, pixel_index, drawn)
    return images.view(-1, SIDE, SIDE)


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _draw(inside: Callable[[Tensor, Tensor], Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
    """One kind of shape: uint8 [N, WINDOW^2], and the pixels' indices in the image, int64 [N, WINDOW^2]."""
    _, scale, orientation, *position = indices.unbind(1)
    # float64: an edge comes within 1e-3 pixels of a pixel's centre, and all devices must draw the same image.
    size = 0.5 + 0.1 * scale.double()
    angle = orientation.remainder(TURN).double() * (2 * math.pi / TURN)
    offset = torch.arange(WINDOW, device=indices.device)
    (left, dx), (top, dy) = (_window(p, offset) for p in position)
    # Into the shape's own coordinates: u to its right, v up, at scale 1.
    cos, sin = (angle.cos() / size)[:, None, None], (angle.sin() / size)[:, None, None]
    right, up = dx[:, None, :], -dy[:, :, None]
    drawn = inside(cos * right + sin * up, cos * up - sin * right)
    pixel_index = (top[:, None] + offset)[:, :, None] * SIDE + (left[:, None] + offset)[:, None, :]
    return drawn.flatten(1).to(torch.uint8), pixel_index.flatten(1)


def _window(position: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Along one axis: the window's first pixel [N], and its pixels' distances from the centre [N, WINDOW]."""
    centre = 16 + 32 * position.double() / 31
    start = centre.floor().long() - WINDOW // 2
    return start, (start[:, None] + offset) + 0.5 - centre[:, None]


def _in_square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) < SQUARE


def _in_ellipse(u: Tensor, v: Tensor) -> Tensor:
    return (u / ELLIPSE[0]).square() + (v / ELLIPSE[1]).square() < 1


def _in_heart(u: Tensor, v: Tensor) -> Tensor:
    """The curve u = width sin^3 t, v = stretch (13 cos t - 5 cos 2t - 2 cos 3t - cos 4t) + shift.

    Above each u it has two points, whose cosines x differ in sign. In powers of x, v is
    stretch (19 x - 8 x^3 + 4 - 2 x^2 - 8 x^4) + shift: an odd part about an even one.
    """
    width, stretch, shift = HEART
    x2 = 1 - (u.abs() / width).clamp(max=1).pow(2 / 3)
    even = 4 - x2 * (2 + 8 * x2)
    odd = x2.sqrt() * (19 - 8 * x2)
    return (((v - shift) / stretch - even).abs() < odd) & (u.abs() < width)


# --- All images -------------------------------------------------------------------------------------------
def all_sprites(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Tensor:
    """All images in the order of `unravel`, one bit per pixel: uint8 [737 280, 512] on a device, 377 MB.

    A GPU draws them each time. A CPU draws them once, and keeps them in the folder.

    Raises:
        OSError: the file cannot be written; nothing of it remains.
    """
    device = torch.device(device)
    if device.type != "cpu":
        return _draw_all(device)
    path = expand(folder) / FILE
    with contextlib.suppress(FileNotFoundError, ValueError):
        packed = _read(path)
        if note := other_owner(path):
            print(f"sprites: {path}{note}", flush=True)
        return packed
    path.parent.mkdir(parents=True, exist_ok=True)
    with wait(lock_of(path), "sprites"):
        try:
            return _read(path)  # drawn while this process waited
        except FileNotFoundError:
            pass
        except ValueError as damage:
            print(f"{path} is damaged ({damage}): drawing again", flush=True)
        return _write(path)


def _write(path: Path) -> Tensor:
    """Draw all images; the file gets its name when it is complete."""
    if shutil.disk_usage(path.parent).free < COUNT * PACKED:
        raise OSError(
            errno.ENOSPC,
            f"the sprites take {COUNT * PACKED:,} bytes, and {disk.free(path.parent)}: "
            "make room or choose another folder",
            str(path.parent),
        )
    packed = _draw_all(torch.device("cpu"))
    data = packed.numpy().data

    def write(file: IO[bytes]) -> None:
        file.write(data)
        file.write(zlib.crc32(data).to_bytes(CHECKSUM, "little"))

    files.write(path, write, data.nbytes + CHECKSUM)
    return packed


def _draw_all(device: torch.device) -> Tensor:
    """uint8 [COUNT, PACKED] on the device, with a progress bar."""
    packed = torch.empty(COUNT, PACKED, dtype=torch.uint8, device=device)

    def draw(start: int) -> int:
        numbers = torch.arange(start, min(start + BLOCK, COUNT), device=device)
        packed[start : start + BLOCK] = pack(render(unravel(numbers)))
        return len(numbers)

    # One thread of torch per worker: whole blocks in parallel scale better than each operation does.
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with tqdm(total=COUNT, desc="sprites", unit=" images", disable=None) as bar:
        try:
            for done in pool.map(draw, range(0, COUNT, BLOCK)):
                bar.update(done)
        finally:  # after an error or Ctrl-C, do not draw the blocks in the queue
            pool.shutdown(cancel_futures=True)
    return packed


def _read(path: Path) -> Tensor:
    """uint8 [COUNT, PACKED]. Raises FileNotFoundError, or ValueError if the file was changed."""
    expected = COUNT * PACKED + CHECKSUM
    with open_regular(path, expected) as file:
        data = np.fromfile(file, np.uint8)
    if len(data) != expected:
        raise UsageError(f"{len(data)} bytes instead of {expected}")
    if zlib.crc32(data[:-CHECKSUM].data) != int.from_bytes(data[-CHECKSUM:].tobytes(), "little"):
        raise UsageError("its checksum is not the one that was written")
    return torch.from_numpy(data[:-CHECKSUM].reshape(COUNT, PACKED))
