"""Layouts on disk, decoding, and the order of an epoch."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from bvae.config import DataConfig
from bvae.data import open_data
from bvae.pipelines import celeba, folder
from bvae.pipelines.resident import Resident
from bvae.pipelines.torch_decode import decode, decode_file

SPLIT_OF = [0] * 8 + [1] * 2 + [2] * 2  # of the twelve images that the fixtures write


def write_image(path, size=(178, 218), seed=0):
    """A smooth random picture of width x height, so that JPEG keeps it and resizing shows differences."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.BICUBIC).save(path, quality=95)


def write_celeba(root, layout):
    """CelebA in torchvision's, Kaggle's or a flat layout."""
    base = root / "celeba" if layout == "torchvision" else root
    images = base / "img_align_celeba" / ("img_align_celeba" if layout == "kaggle" else ".")
    names = [f"{i + 1:06}.jpg" for i in range(len(SPLIT_OF))]
    for i, name in enumerate(names):
        write_image(images / name, seed=i)
    if layout == "kaggle":
        lines = ["image_id,partition", *(f"{n},{s}" for n, s in zip(names, SPLIT_OF, strict=True))]
        (base / "list_eval_partition.csv").write_text("\n".join(lines) + "\n")
    else:
        lines = [f"{n} {s}" for n, s in zip(names, SPLIT_OF, strict=True)]
        (base / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("layout", ["torchvision", "flat", "kaggle"])
def test_celeba_layouts(tmp_path, layout):
    root = write_celeba(tmp_path / "data", layout)
    names = {split: [file.name for file in celeba.files(root, split)] for split in celeba.SPLITS}
    assert names["train"] == [f"{i:06}.jpg" for i in range(1, 9)]
    assert names["valid"] == ["000009.jpg", "000010.jpg"]
    assert names["test"] == ["000011.jpg", "000012.jpg"]


def test_partial_celeba_gives_what_it_holds(tmp_path):
    root = write_celeba(tmp_path, "torchvision")
    for name in ("000002.jpg", "000009.jpg", "000010.jpg"):
        (root / "celeba" / "img_align_celeba" / name).unlink()
    assert len(celeba.files(root, "train")) == 7
    assert celeba.files(root, "valid") == []


def test_partial_celeba_without_validation_images_holds_some_out(tmp_path, capsys):
    root = write_celeba(tmp_path, "torchvision")
    shutil.copytree(root, tmp_path / "copy")
    for name in ("000009.jpg", "000010.jpg"):
        (root / "celeba" / "img_align_celeba" / name).unlink()
    train, valid = open_data(DataConfig("celeba", root), 2, 0, torch.device("cpu"))
    assert (len(train.images), len(valid.images)) == (7, 1)
    assert "every tenth training image is held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no folder", "no folder at"),
        ("no images", "holds no img_align_celeba/ folder"),
        ("zip", "is not unpacked yet"),
        ("quota page", "is not a zip file. Downloads often save"),
        ("no list", "holds no list_eval_partition.txt"),
        ("binary list", "cannot be read"),
        ("bad line", "list_eval_partition.txt, line 3: expected a file name and a split"),
        ("unknown split", "line 1: expected a file name and a split, .* got '000001.jpg 7'"),
    ],
)
def test_celeba_damage(tmp_path, damage, message):
    root = write_celeba(tmp_path / "data", "torchvision")
    base, partition = root / "celeba", root / "celeba" / "list_eval_partition.txt"
    if damage == "no folder":
        shutil.rmtree(root)
    elif damage in ("no images", "zip", "quota page"):
        shutil.rmtree(base / "img_align_celeba")
        if damage == "zip":
            shutil.make_archive(str(base / "img_align_celeba"), "zip", base, "list_eval_partition.txt")
        elif damage == "quota page":
            (base / "img_align_celeba.zip").write_text("<html>Quota exceeded</html>")
    elif damage == "no list":
        partition.unlink()
    elif damage == "binary list":
        partition.write_bytes(b"\xff\xfe\x00\x80")
    elif damage == "bad line":
        partition.write_text("000001.jpg 0\n000002.jpg 0\nnonsense\n")
    elif damage == "unknown split":
        partition.write_text("000001.jpg 7\n")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        celeba.files(root, "train")


@pytest.mark.parametrize("reader", [celeba, folder])
def test_unknown_split(tmp_path, reader):
    with pytest.raises(ValueError, match="unknown split 'dev', expected one of train, valid, test"):
        reader.files(tmp_path, "dev")


def test_folder_takes_any_tree(tmp_path):
    for i in range(20):
        write_image(tmp_path / f"{i % 3}" / "deep" / f"{i:02}{('.jpg', '.PNG', '.jpeg')[i % 3]}", (40, 40))
    (tmp_path / "notes.txt").write_text("not an image")
    parts = {split: folder.files(tmp_path, split) for split in folder.SPLITS}
    assert {split: len(files) for split, files in parts.items()} == {"train": 16, "valid": 2, "test": 2}
    assert len({file for files in parts.values() for file in files}) == 20


def test_folder_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image"):
        folder.files(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="no folder at"):
        folder.files(tmp_path / "absent", "train")


def test_decode_is_pils_crop_and_resize(tmp_path):
    path = tmp_path / "a.png"  # no chroma, so that only crop and resize are compared
    write_image(path)
    ours = decode_file(path, 148, 64, 3)
    pil = v2.Compose([v2.CenterCrop(148), v2.Resize(64), v2.PILToTensor()])(Image.open(path)).permute(1, 2, 0)
    assert ours.shape == (64, 64, 3)
    assert (ours.int() - pil.int()).abs().max() <= 1


def test_without_a_crop_the_largest_square_is_taken(tmp_path):
    write_image(tmp_path / "wide.png", (200, 80))
    middle = Image.open(tmp_path / "wide.png").crop((60, 0, 140, 80)).resize((32, 32), Image.BILINEAR)
    ours = decode_file(tmp_path / "wide.png", None, 32, 3)
    assert (ours.int() - torch.from_numpy(np.array(middle)).int()).abs().max() <= 1


def test_grey(tmp_path):
    write_image(tmp_path / "a.jpg")
    assert decode_file(tmp_path / "a.jpg", 148, 64, 1).shape == (64, 64, 1)


def test_every_bad_file_is_named(tmp_path):
    write_image(tmp_path / "good.jpg")
    write_image(tmp_path / "small.jpg", (100, 120))
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    files = sorted(tmp_path.glob("*.jpg"))
    with pytest.raises(ValueError, match="3 of 4 images cannot be used") as error:
        decode(files, 148, 64, 3, "images")
    for name in ("empty.jpg", "page.jpg", "small.jpg: 100 x 120 pixels are smaller than the crop of 148"):
        assert name in str(error.value)
    assert "good.jpg" not in str(error.value)


def resident(n=23, batch_size=5, seed=1, train=True, flip=True):
    return Resident(
        torch.randint(256, (n, 4, 4, 3), dtype=torch.uint8), batch_size, seed, train=train, flip=flip
    )


def test_training_epoch_is_a_shuffled_pass_without_the_partial_batch():
    data = resident()
    batches = list(data.epoch(0))
    assert len(batches) == len(data) == 4
    indices = torch.cat([index for _, index in batches])
    assert len(indices.unique()) == 20
    assert not torch.equal(indices, indices.sort().values)
    for images, index in batches:
        original = data.images[index]
        flipped = (images == original.flip(2)).flatten(1).all(1)
        kept = (images == original).flatten(1).all(1)
        assert (flipped | kept).all()


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return torch.cat([index for _, index in resident(seed=seed).epoch(epoch)]).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_epoch_can_start_in_the_middle():
    data = resident()
    for (a, i), (b, j) in zip(list(data.epoch(3))[2:], data.epoch(3, start=2), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(i, j)


def test_half_of_the_images_are_flipped_anew_each_epoch():
    data = resident(n=2000, batch_size=2000)

    def flipped(epoch):
        ((images, index),) = data.epoch(epoch)
        mirrored = torch.empty(2000, dtype=torch.bool)
        mirrored[index] = (images == data.images[index].flip(2)).flatten(1).all(1)
        return mirrored

    first, second = flipped(0), flipped(1)
    assert 900 < first.sum() < 1100
    assert 900 < (first ^ second).sum() < 1100


def test_evaluation_keeps_order_and_the_last_batch():
    data = resident(train=False, flip=False)
    batches = list(data.epoch(0))
    assert [len(images) for images, _ in batches] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([images for images, _ in batches]), data.images)


def test_fewer_images_than_a_batch(tmp_path):
    root = write_celeba(tmp_path, "torchvision")
    with pytest.raises(ValueError, match="holds 8 training images, fewer than a batch of 9"):
        open_data(DataConfig("celeba", Path(root)), 9, 0, torch.device("cpu"))


def test_data_root_is_needed():
    with pytest.raises(ValueError, match="--data celeba needs --data-root"):
        open_data(DataConfig("celeba"), 9, 0, torch.device("cpu"))
