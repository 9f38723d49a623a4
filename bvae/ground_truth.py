"""Data sets with known factors or attributes, in the form that a model takes."""

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bvae.config import CHANNELS, LARGEST
from bvae.errors import MissingError, UsageError
from bvae.images import read_image
from bvae.metrics.inputs import Factors
from bvae.model import BetaVAE
from bvae.opening import TABLE, NotRead, read_text
from bvae.paths import expand
from bvae.pipelines import celeba, rooms, sprites
from bvae.pipelines.labelled import Labelled
from bvae.pipelines.packed_loader import unpack
from bvae.reference import scale_pixels

MOST = 1000  # factors


class Truth(NamedTuple):
    """Images by number, and the factors from which they were made."""

    names: tuple[str, ...]  # of the factors; empty if they are not known
    factors: Factors  # [N, K]
    images: Callable[[NDArray[np.int64]], Tensor]  # numbers [n] to float32 [n, C, H, W], in the model's range
    independent: bool = True  # factors of variation; False: attributes that are correlated, each -1 or 1
    crop: int | None = None  # side of the centred square that is read from an image file, in pixels


def unlabelled(model: BetaVAE, pixels: Tensor, crop: int | None) -> Truth:
    """Images whose factors are not known: uint8 [N, H, W, C].

    Raises:
        ValueError: the model takes other images.
    """
    pixels = pixels.permute(0, 3, 1, 2)
    if pixels.shape[1:] != model.input_shape:
        raise UsageError(
            f"the images are {list(pixels.shape[1:])}, and this model takes {list(model.input_shape)}"
        )
    low, _ = model.pixel_range

    def images(numbers: NDArray[np.int64]) -> Tensor:
        return scale_pixels(pixels[torch.from_numpy(numbers)], low)

    return Truth((), np.empty((len(pixels), 0), np.int64), images, independent=False, crop=crop)


def shapes(model: BetaVAE, packed: Tensor, indices: Tensor) -> Truth:
    """2D shapes: packed images, uint8 [N, 512] of one bit per pixel, and their indices [N, 5].

    Raises:
        ValueError: the model does not take grey images of 64 x 64.
    """
    check_input(model, "sprites")
    low, _ = model.pixel_range

    def images(numbers: NDArray[np.int64]) -> Tensor:
        chosen = packed[torch.from_numpy(numbers).to(packed.device)]
        return scale_pixels(unpack(chosen, sprites.SIDE).permute(0, 3, 1, 2), low)

    return Truth(sprites.FACTORS, indices.numpy(), images)


def all_rooms(model: BetaVAE, device: torch.device) -> Truth:
    """All rooms, painted on the device.

    Raises:
        ValueError: the model does not take RGB images of 64 x 64.
    """
    check_input(model, "rooms")
    painter, (low, _) = rooms.Rooms(device), model.pixel_range

    def images(numbers: NDArray[np.int64]) -> Tensor:
        painted = painter.paint(torch.from_numpy(numbers).to(device))
        return scale_pixels(painted.permute(0, 3, 1, 2), low)

    return Truth(rooms.FACTORS, rooms.unravel(torch.arange(rooms.COUNT)).numpy(), images)


def labelled(model: BetaVAE, name: str, data: Labelled) -> Truth:
    """A user's own data set of known factors, read into memory.

    Raises:
        ValueError: the model does not take images of its shape.
    """
    check_input(model, name)
    low, _ = model.pixel_range

    def images(numbers: NDArray[np.int64]) -> Tensor:
        return scale_pixels(data.images[torch.from_numpy(numbers)].permute(0, 3, 1, 2), low)

    return Truth(data.names, data.indices.numpy(), images)


def check_input(model: BetaVAE, name: str) -> None:
    """Raise ValueError for a model that does not take the images of a data set of known factors."""
    expected = (CHANNELS[name], sprites.SIDE, sprites.SIDE)
    if model.input_shape != expected:
        raise UsageError(f"{name} are {list(expected)}, and this model takes {list(model.input_shape)}")


def attributes(root: Path, model: BetaVAE, crop: int | None = None) -> Truth:
    """CelebA's test images; in a partial copy without any, the validation or else the training images.

    Attributes that have the same value in all images are left out.

    Raises:
        FileNotFoundError, ValueError: no CelebA at root, or lists that cannot be read or lack an image.
    """
    root = expand(root)
    splits, (names, rows) = celeba.inventory(root).splits, celeba.attributes(root)
    paths = [Path(str(file)) for file in splits["test"] or splits["valid"] or splits["train"]]
    rows = {celeba.stem(name): row for name, row in rows.items()}  # the images may have another suffix
    if missing := [path.name for path in paths if path.stem not in rows]:
        raise UsageError(f"{root}: the list of attributes lacks {missing[0]} and {len(missing) - 1} more")
    values = np.array([rows[path.stem] for path in paths], np.int64).reshape(len(paths), len(names))
    differ = (values != values[:1]).any(0)
    if not differ.any():
        raise UsageError(f"{root}: its {len(paths)} images have the same value in every attribute")
    varying = tuple(name for name, varies in zip(names, differ, strict=True) if varies)
    crop = crop or _fitting_crop(paths)
    return Truth(varying, values[:, differ], _files(paths, model, crop), independent=False, crop=crop)


def folder(root: Path, model: BetaVAE, bins: int, crop: int | None = None) -> Truth:
    """The images of a folder in CelebA's layout that holds a factors.csv, as `bvae.data faces` writes it.

    Args:
        bins: a factor with more values than this is divided into this many bins of equal width.
        crop: side of the centred square that the model sees, in pixels. None: as in training.

    Raises:
        FileNotFoundError: there is no factors.csv.
        ValueError: it is not a table of numbers with a row for each image file.
    """
    if bins < 2:
        raise UsageError(f"bins of the factors must be at least 2, got {bins}")
    root = expand(root)
    folders = [base for base in (root, root / "celeba") if (base / "factors.csv").exists()]
    if not folders:
        raise MissingError(f"{root} holds no factors.csv: the factors of its images are not known")
    table = folders[0] / "factors.csv"
    try:
        lines = filter(None, csv.reader(io.StringIO(read_text(table, TABLE), newline="")))
        _, *names = next(lines, [""])
        if len(names) > MOST:
            raise NotRead(table, f"{len(names):,} factors are more than {MOST:,}")
        rows = [*lines]
        values = np.array([row[1:] for row in rows], float).reshape(len(rows), len(names))
    except NotRead:
        raise
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{table} is not a table of numbers: {error}") from None
    if not values.size:
        raise UsageError(f"{table} holds no factors")
    if not (np.abs(values) <= LARGEST).all():
        raise UsageError(f"{table} holds values that are not finite")
    for name in (row[0] for row in rows):
        if Path(name).name != name or name == "..":
            raise UsageError(f"{table}: {name!r} is outside the image folder")
    images = folders[0] / "img_align_celeba"
    listed = [row[0] for row in rows]
    files = celeba.match(listed, os.listdir(images) if images.is_dir() else [])
    paths = [images / files.get(name, name) for name in listed]
    factors = np.stack([_levels(column, bins) for column in values.T], 1)
    crop = crop or _fitting_crop(paths)
    return Truth(tuple(names), factors, _files(paths, model, crop), crop=crop)


def _fitting_crop(paths: Sequence[Path]) -> int:
    """The crop of training."""
    return celeba.fitting_crop([str(path) for path in paths])[0]


def _files(paths: Sequence[Path], model: BetaVAE, crop: int) -> Callable[[NDArray[np.int64]], Tensor]:
    """A function that reads images from their files."""

    def images(numbers: NDArray[np.int64]) -> Tensor:
        return torch.cat([read_image(paths[i], crop, model.input_shape, model.pixel_range) for i in numbers])

    return images


def _levels(values: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """Values [N] as 0, 1, ...: one number per value, or bins of equal width if there are too many."""
    distinct, number = np.unique(values, return_inverse=True)
    if len(distinct) <= bins:
        return number
    share = (values - distinct[0]) / (distinct[-1] - distinct[0])
    return np.minimum(share * bins, bins - 1).astype(np.int64)
