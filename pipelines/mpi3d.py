"""Read MPI3D's `mpi3d_toy.npz`, `mpi3d_realistic.npz` or `mpi3d_real.npz` (Gondal et al. 2019)."""

import math
import os
import zipfile

import numpy as np
import torch
from tqdm import tqdm

from bvae.errors import UsageError
from bvae.opening import ARCHIVE, open_regular
from bvae.paths import expand
from bvae.pipelines.labelled import CHUNK, Labelled, check_images, ravelled

FACTORS = (
    *("object_color", "object_shape", "object_size", "camera_height", "background_color"),
    *("horizontal_axis", "vertical_axis"),
)
SIZES = (6, 6, 2, 3, 3, 40, 40)  # values of each factor; the file has no labels but this order


def read(path: str | os.PathLike[str]) -> Labelled:
    """The images and factors of the file, 12.7 GB of memory, with a progress bar.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, or another number of images; the message says which.
    """
    path = expand(path)
    count = math.prod(SIZES)
    with open_regular(path, ARCHIVE) as opened:
        try:
            with zipfile.ZipFile(opened) as archive, archive.open("images.npy") as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, columns_first, dtype = header(file)
                check_images(path, shape, dtype, count)
                if columns_first:
                    raise UsageError(f"{path}: images must be in C's order, got Fortran's")
                images = torch.empty(shape, dtype=torch.uint8)
                with tqdm(total=count, desc="mpi3d", unit=" images", disable=None) as bar:
                    for part in images.split(CHUNK):
                        data = file.read(part.nbytes)
                        if len(data) < part.nbytes:
                            raise EOFError("images ends too early")
                        part.view(-1).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
                        bar.update(len(part))
        except UsageError:
            raise
        except Exception as error:  # zipfile and numpy have no common exception type for damaged files
            raise UsageError(f"{path} is not MPI3D's npz of images: {error}") from None
    return Labelled(FACTORS, images, ravelled(SIZES))
