"""A user's own `dsprites_*.npz`: what is read of it, and what is refused."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bvae.pipelines import dsprites
from bvae.pipelines.dsprites import read
from bvae.pipelines.packed_loader import pack
from bvae.pipelines.sprites import COUNT, render, unravel


class Hostile:
    """A pickle that would run code."""

    def __reduce__(self):
        return (open, ("created", "w"))


def archive(path, **changed) -> Path:
    """What the original holds, of twelve images; None leaves an array out."""
    indices = unravel(torch.arange(0, COUNT, COUNT // 12)[:12])
    arrays = {
        "imgs": render(indices).numpy(),
        "latents_classes": np.column_stack([np.zeros(12, np.int64), indices.numpy()]),
        "metadata": np.array({"title": Hostile()}, dtype=object),  # pickled, as in the original
    }
    np.savez_compressed(path, **{k: v for k, v in {**arrays, **changed}.items() if v is not None})
    return path


def test_images_and_indices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dsprites, "CHUNK", 5)
    packed, indices = read(archive(tmp_path / "dsprites_64x64.npz"))
    assert indices.dtype == torch.int64
    assert torch.equal(packed, pack(render(indices)))
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.uint8, np.bool_])
def test_bool_and_fortran_order_are_read(tmp_path, dtype, order):
    expected = read(archive(tmp_path / "expected.npz")).packed
    images = np.load(tmp_path / "expected.npz")["imgs"].reshape(12, 64, 64)
    path = archive(tmp_path / "changed.npz", imgs=np.asarray(images.astype(dtype), order=order))
    assert torch.equal(read(path).packed, expected)


@pytest.mark.parametrize("change", ["cut", "values"])
def test_damage_in_fortran_order(tmp_path, change):
    images = np.asfortranarray(np.zeros((12, 64, 64), np.uint8))
    if change == "values":
        images[3, 4, 5] = 7
    path = archive(tmp_path / "x.npz", imgs=images)
    if change == "cut":
        with zipfile.ZipFile(path) as source:
            parts = {name: source.read(name) for name in source.namelist()}
        with zipfile.ZipFile(path, "w") as target:
            for name, data in parts.items():
                target.writestr(name, data[:-5000] if name == "imgs.npy" else data)
    with pytest.raises(
        ValueError, match="imgs ends too early" if change == "cut" else "got 7 in one of them"
    ):
        read(path)


def test_a_folder_instead_of_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder: give the file, .*dsprites_\*.npz"):
        read(tmp_path)
    path = archive(tmp_path / "mine.npz")
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder: give the file, {path}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"imgs": None}, "not dSprites' npz.*imgs"),
        ({"latents_classes": None}, "not dSprites' npz.*latents_classes"),
        ({"imgs": np.full((12, 64, 64), 255, np.uint8)}, "imgs must be uint8 or bool .* of 0 and 1, got 255"),
        ({"imgs": np.zeros((12, 32, 32), np.uint8)}, r"got uint8 \[12, 32, 32\]"),
        ({"imgs": np.zeros((12, 64, 64), np.float32)}, "got float32"),
        ({"imgs": np.zeros((0, 64, 64), np.uint8)}, "imgs is empty"),
        ({"imgs": np.array([Hostile()])}, "got object"),
        ({"latents_classes": np.array([Hostile()])}, "not dSprites' npz"),
        ({"latents_classes": np.zeros((12, 5), int)}, r"latents_classes must be integers \[12, 6\]"),
        ({"latents_classes": np.zeros((11, 6), int)}, r"integers \[12, 6\], got int64 \[11, 6\]"),
        ({"latents_classes": np.zeros((12, 6))}, "got float64"),
        ({"latents_classes": np.full((12, 6), 3)}, "shape must be 0 to 2, got 3 to 3"),
    ],
)
def test_a_file_that_is_not_dsprites(tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        read(archive(tmp_path / "other.npz", **changed))
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("harm", ["cut", "changed", "a page"])
def test_a_damaged_file(tmp_path, harm):
    data = bytearray(archive(tmp_path / "whole.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole:
        start = whole.getinfo("imgs.npy").header_offset
    data[start + 200] ^= 255
    harmed = {"cut": data[: len(data) // 2], "changed": data, "a page": b"<html>quota exceeded</html>"}[harm]
    (tmp_path / "harmed.npz").write_bytes(harmed)
    with pytest.raises(ValueError, match="harmed.npz is not dSprites' npz"):
        read(tmp_path / "harmed.npz")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.npz")
