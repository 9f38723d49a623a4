"""Read Cars3D (Reed et al. 2015): a folder of `car_*_mesh.mat`, one for each car."""

import io
import os

import numpy as np
import torch
from tqdm import tqdm

from bvae.errors import UsageError
from bvae.opening import IMAGE, read_bytes
from bvae.paths import expand
from bvae.pipelines.labelled import SIDE, Labelled, ravelled

FACTORS = ("elevation", "azimuth", "car")
SIZES = (4, 24, 183)  # values of each factor
STORED = 128  # pixels of an image in the files


def read(path: str | os.PathLike[str]) -> Labelled:
    """The images, resized to 64 x 64, and factors of the folder, with a progress bar.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: other files, or another number of them; the message says which.
    """
    from scipy.io import loadmat  # the extra `train`

    from bvae.pipelines.torch_decode import resize  # imports torchvision, which takes seconds

    folder = expand(path)
    files = sorted(file for file in folder.iterdir() if file.suffix == ".mat")
    elevations, azimuths, cars = SIZES
    if len(files) != cars:
        raise UsageError(f"{folder} must hold {cars} files car_*_mesh.mat, got {len(files)} .mat files")
    images = torch.empty(*SIZES, SIDE, SIDE, 3, dtype=torch.uint8)
    expected = (STORED, STORED, 3, azimuths, elevations)
    for car, file in enumerate(tqdm(files, desc="cars3d", unit=" cars", disable=None)):
        data = io.BytesIO(read_bytes(file, IMAGE))
        try:
            mesh = loadmat(data, variable_names=["im"])["im"]
        except Exception as error:  # scipy has no common exception type for damaged files
            raise UsageError(f"{file} is not a .mat file of images `im`: {error}") from None
        if not isinstance(mesh, np.ndarray) or mesh.shape != expected or mesh.dtype != np.uint8:
            raise UsageError(
                f"{file}: im must be uint8 {list(expected)}, got {mesh.dtype} {list(mesh.shape)}"
            )
        squares = torch.from_numpy(np.ascontiguousarray(mesh.transpose(4, 3, 0, 1, 2)))
        images[:, :, car] = resize(squares.flatten(0, 1), SIDE).view(elevations, azimuths, SIDE, SIDE, 3)
    return Labelled(FACTORS, images.flatten(0, 2), ravelled(SIZES))
