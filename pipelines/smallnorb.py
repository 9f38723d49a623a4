"""Read SmallNORB (LeCun et al. 2004): a folder of `smallnorb-*-{dat,cat,info}.mat`, training and testing.

The files are not MATLAB's. They hold a type, the number of dimensions, at least three of them, the values.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bvae.errors import MissingError, UsageError
from bvae.opening import IMAGE, read_bytes
from bvae.paths import expand
from bvae.pipelines.labelled import SIDE, Labelled, numbered

FACTORS = ("category", "elevation", "azimuth", "lighting")
SIZES = (5, 9, 18, 6)  # values of each factor; the ten toys of a category are no factor, as elsewhere
SETS = ("5x46789x9x18x6x2x96x96-training", "5x01235x9x18x6x2x96x96-testing")
TYPES: dict[int, np.dtype] = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}
STORED = 96  # pixels of an image in the files


def read(path: str | os.PathLike[str]) -> Labelled:
    """The left camera's images, grey and resized to 64 x 64, and their factors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another layout, or other factors; the message says which.
    """
    from bvae.pipelines.torch_decode import resize  # imports torchvision, which takes seconds

    folder = expand(path)
    images, values = [], []
    for name in SETS:
        data, category, info = (
            _matrix(folder / f"smallnorb-{name}-{part}.mat") for part in ("dat", "cat", "info")
        )
        count = len(category)
        shapes = (data.shape, category.shape, info.shape)
        if shapes != ((count, 2, STORED, STORED), (count,), (count, 4)):
            raise UsageError(
                f"{folder}: dat, cat and info of {name} must be [N, 2, {STORED}, {STORED}], [N] and [N, 4], "
                f"got {', '.join(str(list(shape)) for shape in shapes)}"
            )
        images.append(resize(torch.from_numpy(data[:, 0, :, :, None].copy()), SIDE))
        values.append(np.column_stack([category, info[:, 1:]]))  # without the toy
    return Labelled(FACTORS, torch.cat(images), numbered(folder, FACTORS, SIZES, np.concatenate(values)))


def _matrix(path: Path) -> NDArray[np.integer]:
    """The array in a file."""
    if not path.exists() and path.with_name(path.name + ".gz").exists():
        raise MissingError(f"{path} is still compressed: gunzip {path.name}.gz")
    data = read_bytes(path, IMAGE)
    expected = f"{path} is not a file of SmallNORB:"
    if len(data) < 8:
        raise UsageError(f"{expected} {len(data)} bytes")
    magic, dimensions = np.frombuffer(data, "<i4", 2).tolist()
    if magic not in TYPES or not 1 <= dimensions <= 4:
        raise UsageError(f"{expected} it starts with type {magic:#x} and {dimensions} dimensions")
    start = 8 + 4 * max(3, dimensions)
    shape = np.frombuffer(data[8:start].ljust(start - 8, b"\0"), "<i4")[:dimensions].tolist()
    dtype = TYPES[magic]
    if min(shape) < 0 or len(data) != start + math.prod(shape) * dtype.itemsize:
        raise UsageError(f"{expected} {len(data)} bytes do not hold {shape} values of {dtype}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)
