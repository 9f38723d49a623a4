"""A user's 3D Shapes, MPI3D, Cars3D and SmallNORB: tiny files of the same layout, and what is refused."""

import json
import math
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from bvae import config
from bvae.config import Config, DataConfig
from bvae.datasets import READERS, held_out, open_data
from bvae.evaluate import main as evaluate
from bvae.model import BetaVAE
from bvae.pipelines import cars3d, mpi3d, shapes3d, smallnorb
from bvae.pipelines.labelled import Labelled
from bvae.train import main as train

TINY = {  # values of each factor, instead of the sets' own
    "shapes3d": (2, 1, 2, 3, 2, 2),
    "mpi3d": (2, 2, 1, 2, 1, 3, 2),
    "cars3d": (2, 3, 4),
    "smallnorb": (2, 3, 4, 2),
}
MODULES = {"shapes3d": shapes3d, "mpi3d": mpi3d, "cars3d": cars3d, "smallnorb": smallnorb}
ORIGINAL = {name: module.SIZES for name, module in MODULES.items()}


def pictures(count: int, side: int = 64, channels: int = 3) -> np.ndarray:
    """Each of one colour, which tells its number."""
    colours = np.stack([37 * np.arange(count) % 251, np.arange(count), 255 - np.arange(count)], 1)[
        :, :channels
    ]
    return np.broadcast_to(colours[:, None, None].astype(np.uint8), (count, side, side, channels)).copy()


def matrix(values: np.ndarray) -> bytes:
    """SmallNORB's format: a scalar's or a vector's dimensions are filled up with ones."""
    magic = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[values.dtype.name]
    shape = (*values.shape, 1, 1)[: max(3, values.ndim)]
    return np.array([magic, values.ndim, *shape], "<i4").tobytes() + values.tobytes()


def write(name: str, folder: Path) -> Path:
    """A tiny data set with the layout of the original, all factors in each combination."""
    sizes = TINY[name]
    count = math.prod(sizes)
    indices = np.indices(sizes).reshape(len(sizes), -1).T
    images = pictures(count)
    if name == "shapes3d":
        with h5py.File(folder / "3dshapes.h5", "w") as file:
            file.create_dataset("images", data=images, chunks=(5, 64, 64, 3), compression="gzip")
            file.create_dataset("labels", data=indices * 0.1 - 30)
        return folder / "3dshapes.h5"
    if name == "mpi3d":
        np.savez(folder / "mpi3d_toy.npz", images=images)
        return folder / "mpi3d_toy.npz"
    if name == "cars3d":
        for car in range(sizes[2]):
            mine = images[indices[:, 2] == car].reshape(*sizes[:2], 64, 64, 3).repeat(2, 2).repeat(2, 3)
            savemat(folder / f"car_{car:03}_mesh.mat", {"im": mine.transpose(2, 3, 4, 1, 0)})
        return folder
    for number, part in enumerate(smallnorb.SETS):  # each has half of the toys
        left = pictures(count, 96, 1)[..., 0] + 100 * number
        data = np.stack([left, 255 - left], 1).astype(np.uint8)
        category, elevation, azimuth, lighting = indices.T.astype(np.int32)
        info = np.stack([np.full(count, number, np.int32), elevation, 2 * azimuth, lighting], 1)
        for suffix, values in (("dat", data), ("cat", category), ("info", info)):
            (folder / f"smallnorb-{part}-{suffix}.mat").write_bytes(matrix(values))
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The sizes of the tiny sets, read a few images at a time."""
    for name, module in MODULES.items():
        monkeypatch.setattr(module, "SIZES", TINY[name])
    for module in (shapes3d, mpi3d):
        monkeypatch.setattr(module, "CHUNK", 7)


def test_sizes_of_the_originals():
    assert {name: math.prod(sizes) for name, sizes in ORIGINAL.items()} == {
        **{"shapes3d": 480_000, "mpi3d": 1_036_800, "cars3d": 17_568},
        "smallnorb": 24_300 // 5,  # of one of its toys
    }


@pytest.mark.parametrize("name", READERS)
def test_images_and_indices(name, tmp_path):
    data = READERS[name].read(write(name, tmp_path))
    sizes, channels = TINY[name], config.CHANNELS[name]
    grid = torch.from_numpy(np.indices(sizes).reshape(len(sizes), -1).T)
    expected = torch.from_numpy(pictures(len(grid), channels=channels))
    if name == "smallnorb":
        grid, expected = torch.cat([grid, grid]), torch.cat([expected, expected + 100])
    assert torch.equal(data.indices, grid)
    assert data.images.dtype == torch.uint8
    assert torch.equal(data.images, expected)
    assert data.names == MODULES[name].FACTORS


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_other_factors(name, tmp_path, monkeypatch):
    path = write(name, tmp_path)
    other = (*TINY[name][:-1], TINY[name][-1] + 1)
    monkeypatch.setattr(MODULES[name], "SIZES", other)
    message = {
        "shapes3d": r"images must be uint8 \[72, 64, 64, 3\], got uint8 \[48, 64, 64, 3\]",
        "mpi3d": r"images must be uint8 \[72, 64, 64, 3\], got uint8 \[48, 64, 64, 3\]",
        "cars3d": r"must hold 5 files car_\*_mesh.mat, got 4 .mat files",
        "smallnorb": "lighting must have 3 values, got 2",
    }
    with pytest.raises(ValueError, match=message[name]):
        READERS[name].read(path)


def test_labels_of_other_factors(tmp_path, monkeypatch):
    path = write("shapes3d", tmp_path)
    monkeypatch.setattr(shapes3d, "SIZES", (2, 2, 1, 3, 2, 2))  # as many images
    with pytest.raises(ValueError, match="wall_hue must have 2 values, got 1"):
        shapes3d.read(path)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("harm", ["page", "cut", "absent"])
def test_damage(name, harm, tmp_path):
    path = write(name, tmp_path)
    file = path if path.is_file() else sorted(path.iterdir())[0]
    if harm == "absent":
        with pytest.raises(FileNotFoundError):
            READERS[name].read(tmp_path / "absent" / path.name)
        return
    data = file.read_bytes()
    file.write_bytes(b"<html>quota exceeded</html>" if harm == "page" else data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{file.name} is not "):
        READERS[name].read(path)


def test_mpi3d_that_ends_early(tmp_path):
    path = write("mpi3d", tmp_path)
    with zipfile.ZipFile(path) as source:
        data = source.read("images.npy")
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("images.npy", data[:-5000])
    with pytest.raises(ValueError, match="images ends too early"):
        mpi3d.read(path)


def test_cars_of_another_shape(tmp_path):
    folder = write("cars3d", tmp_path)
    savemat(folder / "car_002_mesh.mat", {"im": np.zeros((128, 128, 3, 2, 2), np.uint8)})
    with pytest.raises(ValueError, match=r"car_002_mesh.mat: im must be uint8 \[128, 128, 3, 3, 2\], got"):
        cars3d.read(folder)


def test_smallnorb_as_it_was_downloaded(tmp_path):
    folder = write("smallnorb", tmp_path)
    file = next(folder.glob("*training-dat.mat"))
    file.rename(f"{file}.gz")
    with pytest.raises(ValueError, match=r"still compressed: gunzip smallnorb.*-training-dat\.mat\.gz"):
        smallnorb.read(folder)


# --- Use --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", READERS)
def test_training_data(name, tmp_path):
    data: Labelled = READERS[name].read(write(name, tmp_path))
    options = DataConfig(name=name, root=tmp_path, channels=config.CHANNELS[name], flip=False)
    if data.images.shape[3] == 3 and name != "cars3d":
        options = DataConfig(name=name, root=next(tmp_path.iterdir()), flip=False)
    train_on, valid, bad, *_ = open_data(options, 8, 7, torch.device("cpu"))
    assert (train_on.count, valid.count, bad) == (len(data.images), len(data.images), [])
    images, index = next(train_on.epoch(0))
    assert torch.equal(images, data.images[index])
    assert torch.equal(held_out(options, 5), valid.head(5))


def test_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(cars3d, "SIZES", (2, 3, 10))
    monkeypatch.setitem(TINY, "cars3d", (2, 3, 10))
    (tmp_path / "cars").mkdir()
    root = write("cars3d", tmp_path / "cars")
    torch.manual_seed(0)
    model = BetaVAE(3, 4, (4, 8), 64, "sigmoid").eval()
    with torch.no_grad():
        model.head.weight[:4] *= 50
    model.save_pretrained(tmp_path / "run")
    settings = DataConfig(name="cars3d", root=root, flip=False)
    (tmp_path / "run" / "config.yaml").write_text(Config(data=settings).to_yaml())
    assert evaluate([str(tmp_path / "run"), "--seeds", "1", "--points", "60"]) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (result["images"], result["factors"]) == (60, list(cars3d.FACTORS))


@pytest.mark.parametrize("name", READERS)
def test_without_its_path(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train(["--data", name, "--out", "run"]) == 2
    assert f"--data {name} needs --data-root, {READERS[name].what}" in capsys.readouterr().err
