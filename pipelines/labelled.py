"""A user's data set with known factors, in memory; the checks that its readers share."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bvae.errors import UsageError

SIDE = 64  # pixels of an image
CHUNK = 4096  # images read at a time


class Labelled(NamedTuple):
    """The images of the files, and the factors that each was made from."""

    names: tuple[str, ...]  # of the factors
    images: Tensor  # uint8 [N, 64, 64, C]
    indices: Tensor  # int64 [N, K], each factor's values counted from 0


def ravelled(sizes: Sequence[int]) -> Tensor:
    """The indices of a whole grid of factors, with the last varying fastest: int64 [N, K]."""
    return torch.from_numpy(np.indices(sizes).reshape(len(sizes), -1).T.copy())


def numbered(path: Path, names: Sequence[str], sizes: Sequence[int], values: NDArray[np.generic]) -> Tensor:
    """Values of factors [N, K], each column's counted from 0 in rising order: int64 [N, K].

    Raises:
        UsageError: a factor with another number of values.
    """
    columns = []
    for name, size, column in zip(names, sizes, values.T, strict=True):
        distinct, number = np.unique(column, return_inverse=True)
        if len(distinct) != size:
            raise UsageError(f"{path}: {name} must have {size} values, got {len(distinct)}")
        columns.append(number)
    return torch.from_numpy(np.stack(columns, 1))


def check_images(path: Path, shape: tuple[int, ...], dtype: np.dtype, count: int) -> None:
    """Raise UsageError unless an array holds `count` RGB images of 64 x 64, uint8 [N, 64, 64, 3]."""
    if shape != (count, SIDE, SIDE, 3) or dtype != np.uint8:
        raise UsageError(
            f"{path}: images must be uint8 {[count, SIDE, SIDE, 3]}, got {dtype} {list(shape)}: a set with "
            "other factors?"
        )
