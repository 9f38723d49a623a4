"""Read a `dsprites_*.npz` file, without its pickled part and without unpacking it whole in memory."""

import os
import zipfile
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bvae.errors import UsageError
from bvae.opening import ARCHIVE, open_regular
from bvae.paths import expand
from bvae.pipelines.packed_loader import pack
from bvae.pipelines.sprites import COUNT, FACTORS, SIDE, SIZES

CLASSES = 1000 + COUNT * (1 + len(SIZES)) * 8  # most bytes of the indices, as int64
CHUNK = 8192  # images read at a time: 34 MB


class Dsprites(NamedTuple):
    """The images of the file, and their indices."""

    packed: Tensor  # uint8 [N, 512], one bit per pixel
    indices: Tensor  # int64 [N, 5], in the order of sprites.FACTORS


def read(path: str | os.PathLike[str]) -> Dsprites:
    """The images and indices of the file, with a progress bar.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file, or damaged; the message says how.
    """
    path = expand(path)
    if path.is_dir():
        inside = sorted(name for name in os.listdir(path) if name.endswith(".npz"))
        raise UsageError(
            f"{path} is a folder: give the file, {os.path.join(path, (inside or ['dsprites_*.npz'])[0])}"
        )
    with open_regular(path, ARCHIVE) as opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                if (size := archive.getinfo("latents_classes.npy").file_size) > CLASSES:
                    raise UsageError(f"latents_classes of {size:,} bytes are more than {CLASSES:,}")
                with archive.open("latents_classes.npy") as file:
                    classes = np.lib.format.read_array(file, allow_pickle=False)
                with archive.open("imgs.npy") as file:
                    packed = _read_images(file)
            indices = _check(classes, len(packed))
        except Exception as error:  # zipfile and numpy have no common exception type for damaged files
            raise UsageError(f"{path} is not dSprites' npz of imgs and latents_classes: {error}") from None
    return Dsprites(packed, torch.from_numpy(indices))


def _read_images(file: IO[bytes]) -> Tensor:
    """uint8 [N, 512] from the array of images, in chunks."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = header(file)
    expected = f"imgs must be uint8 or bool [N, {SIDE}, {SIDE}] of 0 and 1, got"
    if shape[1:] != (SIDE, SIDE) or dtype not in (np.uint8, np.bool_):
        raise UsageError(f"{expected} {dtype} {list(shape)}")
    if not shape[0]:
        raise UsageError("imgs is empty")
    if shape[0] > COUNT:
        raise UsageError(f"{expected} {list(shape)}: dSprites has {COUNT:,} images")
    if columns_first:
        return _read_planes(file, shape[0], expected)
    parts = []
    with tqdm(total=shape[0], desc="dsprites", unit=" images", disable=None) as bar:
        for start in range(0, shape[0], CHUNK):
            count = min(CHUNK, shape[0] - start)
            parts.append(pack(_read_pixels(file, count * SIDE**2, expected).view(count, -1)))
            bar.update(count)
    return torch.cat(parts)


def _read_planes(file: IO[bytes], count: int, expected: str) -> Tensor:
    """uint8 [count, 512] from an array in Fortran's order: a pixel of all images, then the pixel below it."""
    first = _read_pixels(file, count, expected)  # before memory is taken for as many as the header says
    packed = torch.zeros(SIDE**2 // 8, count, dtype=torch.uint8)
    for number in tqdm(range(SIDE**2), desc="dsprites", unit=" pixels", disable=None):
        column, row = divmod(number, SIDE)
        byte, bit = divmod(row * SIDE + column, 8)
        packed[byte] |= (_read_pixels(file, count, expected) if number else first) << (7 - bit)
    return packed.T.contiguous()


def _read_pixels(file: IO[bytes], count: int, expected: str) -> Tensor:
    """The next pixels, uint8 [count] of 0 and 1."""
    data = file.read(count)
    if len(data) < count:
        raise UsageError("imgs ends too early")
    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if pixels.max() > 1:
        raise UsageError(f"{expected} {pixels.max()} in one of them")
    return pixels


def _check(classes: np.ndarray, count: int) -> np.ndarray:
    """The columns of FACTORS, int64 [count, 5]; the first column, the colour, is always white."""
    if classes.shape != (count, 1 + len(SIZES)) or classes.dtype.kind not in "iu":
        raise UsageError(
            f"latents_classes must be integers [{count}, {1 + len(SIZES)}], "
            f"got {classes.dtype} {list(classes.shape)}"
        )
    indices = classes[:, 1:].astype(np.int64)
    for name, size, column in zip(FACTORS, SIZES, indices.T, strict=True):
        if not 0 <= column.min() <= column.max() < size:
            raise UsageError(
                f"latents_classes: {name} must be 0 to {size - 1}, got {column.min()} to {column.max()}"
            )
    return indices
