"""Read 3D Shapes' `3dshapes.h5` (Burgess & Kim 2018): images and labels of 480 000 rooms."""

import math
import os

import torch
from tqdm import tqdm

from bvae.errors import UsageError
from bvae.opening import ARCHIVE, open_regular
from bvae.paths import expand
from bvae.pipelines.labelled import CHUNK, Labelled, check_images, numbered
from bvae.pipelines.rooms import FACTORS, SIZES


def read(path: str | os.PathLike[str]) -> Labelled:
    """The images and factors of the file, 5.9 GB of memory, with a progress bar.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, other factors, or h5py is not installed; the message says which.
    """
    try:
        import h5py
    except ModuleNotFoundError:
        raise UsageError("3dshapes.h5 needs h5py: pip install 'bvae[hdf5]'") from None
    path = expand(path)
    count = math.prod(SIZES)
    with open_regular(path, ARCHIVE) as opened:
        try:
            with h5py.File(opened, "r") as file:
                stored, labels = file["images"], file["labels"][:]
                check_images(path, stored.shape, stored.dtype, count)
                images = torch.empty(stored.shape, dtype=torch.uint8)
                with tqdm(total=count, desc="3dshapes", unit=" images", disable=None) as bar:
                    for start in range(0, count, CHUNK):
                        part = images[start : start + CHUNK]
                        stored.read_direct(part.numpy(), slice(start, start + len(part)))
                        bar.update(len(part))
        except UsageError:
            raise
        except Exception as error:  # h5py raises KeyError, OSError, RuntimeError and TypeError for damage
            raise UsageError(f"{path} is not 3D Shapes' h5 of images and labels: {error}") from None
    if labels.shape != (count, len(FACTORS)):
        raise UsageError(f"{path}: labels must be {[count, len(FACTORS)]}, got {list(labels.shape)}")
    return Labelled(FACTORS, images, numbered(path, FACTORS, SIZES, labels))
