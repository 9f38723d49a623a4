"""Layouts on disk, and from a configuration to the data sets of a run."""

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from pictures import write_celeba, write_folder, write_image

from bvae.config import DataConfig
from bvae.datasets import open_data
from bvae.errors import UsageError
from bvae.pipelines import celeba, folder
from bvae.pipelines.webdataset import read

CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", ["torchvision", "flat", "kaggle"])
def test_celeba_layouts(tmp_path, layout):
    root = write_celeba(tmp_path / "data", layout)
    names = {
        split: [Path(file).name for file in files] for split, files in celeba.inventory(root).splits.items()
    }
    assert names["train"] == [f"{i:06}.jpg" for i in range(1, 9)]
    assert names["valid"] == ["000009.jpg", "000010.jpg"]
    assert names["test"] == ["000011.jpg", "000012.jpg"]


def test_partial_celeba_gives_what_it_holds(tmp_path):
    root = write_celeba(tmp_path, "torchvision")
    for name in ("000002.jpg", "000009.jpg", "000010.jpg"):
        (root / "celeba" / "img_align_celeba" / name).unlink()
    splits = celeba.inventory(root).splits
    assert len(splits["train"]) == 7
    assert splits["valid"] == []


def test_partial_celeba_without_validation_images_holds_some_out(tmp_path, capsys):
    root = write_celeba(tmp_path, "torchvision")
    shutil.copytree(root, tmp_path / "copy")
    for name in ("000009.jpg", "000010.jpg"):
        (root / "celeba" / "img_align_celeba" / name).unlink()
    train, valid, *_ = open_data(DataConfig("celeba", root), 2, 0, CPU)
    assert (train.count, valid.count) == (7, 1)
    assert "every tenth training image is held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no folder", "no folder at"),
        ("no images", "holds a folder img_align_celeba/"),
        ("zip", "is not unpacked yet"),
        ("quota page", "is not a zip file. Downloads often save"),
        ("no list", "holds no list_eval_partition.txt"),
        ("binary list", "cannot be read"),
        ("empty list", "list_eval_partition.txt is empty"),
        ("list is a folder", "list_eval_partition.txt cannot be read"),
        ("web page as CSV", "expected the header image_id,partition, got '<html>'"),
        ("bad line", "list_eval_partition.txt, line 3: expected a file name and a split"),
        ("unknown split", "line 1: expected a file name and a split, .* got '000001.jpg 7'"),
        ("climbing name", "line 1: ../../secret.jpg is outside the image folder"),
        ("absolute name", "line 1: /etc/secret.jpg is outside the image folder"),
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
    elif damage == "empty list":
        partition.write_text("")
    elif damage == "list is a folder":
        partition.unlink()
        partition.mkdir()
    elif damage == "web page as CSV":
        partition.unlink()
        partition.with_suffix(".csv").write_text("<html>\nQuota exceeded\n</html>\n")
    elif damage == "bad line":
        partition.write_text("000001.jpg 0\n000002.jpg 0\nnonsense\n")
    elif damage == "unknown split":
        partition.write_text("000001.jpg 7\n")
    elif damage == "climbing name":
        partition.write_text("../../secret.jpg 0\n")
    elif damage == "absolute name":
        partition.write_text("/etc/secret.jpg 0\n")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        celeba.inventory(root)


def test_folder_takes_any_tree(tmp_path):
    for i in range(20):
        write_image(tmp_path / f"{i % 3}" / "deep" / f"{i:02}{('.jpg', '.PNG', '.jpeg')[i % 3]}", (40, 40))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._00.jpg").write_text("what macOS leaves beside 00.jpg")
    (tmp_path / "folder.jpg").mkdir()
    parts = folder.inventory(tmp_path).splits
    assert {split: len(files) for split, files in parts.items()} == {"train": 16, "valid": 2, "test": 2}
    assert len({file for files in parts.values() for file in files}) == 20


def test_folder_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image"):
        folder.inventory(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder at"):
        folder.inventory(tmp_path / "absent")


def shard(path, files):
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, Path(file).name)


def test_tar_shards_are_read_in_place(tmp_path):
    loose = write_folder(tmp_path / "loose", 20)
    files = sorted(loose.iterdir())
    (loose / "007.json").write_text("{}")
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "00.tar", [*files[:8], loose / "007.json"])
    shard(tmp_path / "shards" / "01.tar", files[8:])
    sharded, plain = folder.inventory(tmp_path / "shards").splits, folder.inventory(loose).splits
    for split, members in sharded.items():
        assert [read(member) for member in members] == [read(file) for file in plain[split]]
    train, valid, *_ = open_data(DataConfig("folder", tmp_path / "shards"), 4, 0, CPU)
    again, *_ = open_data(DataConfig("folder", loose), 4, 0, CPU)
    assert (train.count, valid.count) == (16, 2)
    assert torch.equal(train.head(16), again.head(16))


def test_hidden_members_of_shards_are_passed_over(tmp_path):
    """macOS puts ._x.jpg beside x.jpg; names that begin with ./ are not hidden."""
    loose = write_folder(tmp_path / "loose", 10)
    (loose / "._000.jpg").write_text("what macOS leaves")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "00.tar", "w") as tar:
        tar.add(loose, ".")
    found = folder.inventory(tmp_path / "shards")
    assert sum(map(len, found.splits.values())) == 10
    assert found.notes == ["1 file passed over: 1 hidden"]


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_shard_is_named(tmp_path, mode, kind):
    with tarfile.open(tmp_path / "00.tar", mode) as tar:
        tar.add(write_image(tmp_path / "a.jpg"), "a.jpg")
    with pytest.raises(
        UsageError, match=rf"00.tar is compressed \({kind}\), not a plain tar file: unpack it"
    ):
        folder.inventory(tmp_path)


@pytest.mark.parametrize("ending", [".webp", ".bmp", ".gif", ".tif", ".TIFF"])
def test_a_folder_of_other_formats_trains(tmp_path, ending):
    for i in range(20):
        write_image(tmp_path / f"{i:02}{ending}", (40, 40), seed=i)
    train, valid, bad, *_ = open_data(DataConfig("folder", tmp_path), 4, 0, CPU)
    assert (train.count, valid.count, bad) == (16, 2, [])


def test_truncated_shard(tmp_path):
    files = sorted(write_folder(tmp_path / "loose", 10).iterdir())
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "00.tar", files)
    whole = (tmp_path / "shards" / "00.tar").read_bytes()
    (tmp_path / "shards" / "00.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="00.tar is not a tar file that can be read"):
        folder.inventory(tmp_path / "shards")
    (tmp_path / "shards" / "00.tar").write_text("<html>")
    with pytest.raises(ValueError, match="00.tar is not a tar file that can be read"):
        folder.inventory(tmp_path / "shards")


def test_fewer_images_than_a_batch_make_a_smaller_one(tmp_path):
    config = DataConfig("celeba", write_celeba(tmp_path, "torchvision"))
    train = open_data(config, 9, 0, CPU).train
    assert (train.batch_size, len(train)) == (8, 1)
    assert open_data(config, 9, 0, CPU, accumulate=3).train.batch_size == 6
    assert open_data(config, 9, 0, CPU, 1, 2, accumulate=2).train.batch_size == 4
    with pytest.raises(UsageError, match="at least 2 are needed for each of 5 parts"):
        open_data(config, 9, 0, CPU, accumulate=5)


def test_a_handful_of_images(tmp_path):
    train, valid, *_ = open_data(DataConfig("folder", write_folder(tmp_path / "few", 3)), 144, 0, CPU)
    assert (train.count, train.batch_size, valid.count) == (2, 2, 1)
    with pytest.raises(UsageError, match="holds 1 training images: at least 2 are needed"):
        open_data(DataConfig("folder", write_folder(tmp_path / "fewer", 2)), 144, 0, CPU)


def test_data_root_is_needed():
    with pytest.raises(ValueError, match="--data celeba needs --data-root"):
        open_data(DataConfig("celeba"), 9, 0, CPU)


# ---- damage ------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged_folder(tmp_path):
    """Twenty images, of which two for training and one for validation are none."""
    root = write_folder(tmp_path / "damaged", 20)
    for name in ("002.jpg", "004.jpg", "013.jpg"):
        (root / name).write_text("<html>quota exceeded</html>")
    return root


@pytest.mark.parametrize("stream", [False, True], ids=["cached", "streamed"])
def test_all_bad_files_are_named(damaged_folder, stream, capsys):
    config = DataConfig("folder", damaged_folder, stream=stream)
    for _ in range(2):  # a cache remembers them
        with pytest.raises(ValueError, match="3 of 18 images cannot be used") as error:
            open_data(config, 2, 0, CPU)
        for name in ("002.jpg", "004.jpg", "013.jpg"):
            assert f"{name}: a web page instead of an image" in str(error.value)
        assert "--on-bad skip" in str(error.value)


@pytest.mark.parametrize("stream", [False, True], ids=["cached", "streamed"])
def test_skipping_trains_without_them(damaged_folder, stream, capsys):
    config = DataConfig("folder", damaged_folder, stream=stream, on_bad="skip")
    train, valid, bad, *_ = open_data(config, 2, 0, CPU)
    assert (train.count, valid.count) == (14, 1)
    assert [Path(file).name for file, _ in bad] == ["002.jpg", "013.jpg", "004.jpg"]
    assert "3 of 18 images cannot be used: training without them" in capsys.readouterr().out
    assert train.head(14).flatten(1).any(1).all()  # no image of zeros where a file was bad
    assert open_data(config, 15, 0, CPU).train.batch_size == 14


def test_nothing_but_bad_files(tmp_path):
    for name in "abcdefghij":
        (tmp_path / f"{name}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="9 of 9 images cannot be used"):
        open_data(DataConfig("folder", tmp_path, on_bad="skip"), 2, 0, CPU)
