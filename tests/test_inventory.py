"""What a data set holds and what is passed over: the same for check, ingest and training."""

import os
import tarfile

import pytest
from pictures import write_celeba, write_folder, write_image

from bvae.config import DataConfig
from bvae.data import main
from bvae.datasets import find_files, inventory
from bvae.pipelines import celeba, folder
from bvae.train import main as train


def counts(found):
    return {split: len(files) for split, files in found.splits.items()}


def total(found):
    return sum(counts(found).values())


def write_files(root, n, suffix):
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (root / f"other{i}{suffix}").write_bytes(b"x")


# ---- folders -----------------------------------------------------------------------------------------------
def test_other_files_are_counted_by_suffix(tmp_path):
    write_folder(tmp_path, 20)
    write_files(tmp_path / "a", 80, ".HEIC")
    write_files(tmp_path, 2, ".txt")
    write_files(tmp_path, 1, "")
    found = folder.inventory(tmp_path)
    assert total(found) == 20
    assert found.notes == ["83 files passed over: 80 .heic, 2 .txt, 1 without a suffix"]


def test_archives_beside_images_are_named(tmp_path):
    write_folder(tmp_path, 20)
    write_files(tmp_path, 2, ".tar.gz")
    write_files(tmp_path, 1, ".zip")
    assert folder.inventory(tmp_path).notes == [
        "3 files passed over: 2 .tar.gz, 1 .zip",
        ".zip, .tar.gz files are not read: unpack them",
    ]


def test_no_image_is_an_error_that_counts_the_other_files(tmp_path, capsys):
    write_files(tmp_path, 80, ".heic")
    for command in ("check", "ingest"):
        assert main([command, str(tmp_path)]) == 2
        assert "80 files passed over: 80 .heic" in capsys.readouterr().err
    assert train(["--data", "folder", "--data-root", str(tmp_path)]) == 2
    assert "80 files passed over: 80 .heic" in capsys.readouterr().err


def test_linked_folders_are_read_and_loops_are_not(tmp_path):
    root, elsewhere = write_folder(tmp_path / "images", 20), write_folder(tmp_path / "elsewhere", 30)
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "sub").mkdir()
    write_image(root / "sub" / "a.jpg", (40, 40))
    (root / "beside").symlink_to(root / "sub")
    (root / "broken.jpg").symlink_to(tmp_path / "absent.jpg")
    found = folder.inventory(root)
    assert total(found) == 51
    names = [str(file) for split in found.splits.values() for file in split]
    assert sum("/again/" in name for name in names) == 30
    assert sum("/sub/" in name for name in names) == 1
    assert found.notes == [
        "1 file passed over: 1 broken links",
        f"2 folders passed over, a link to a folder above it: {root}/again/back, {root}/up",
        f"1 folder passed over, a link to a folder that is read: {root}/beside",
        f"1 folder passed over, read under another name: {root}/linked",
    ]


def test_hidden_folders_and_files_are_passed_over(tmp_path):
    write_folder(tmp_path, 20)
    write_folder(tmp_path / ".ipynb_checkpoints", 20)
    (tmp_path / "._000.jpg").write_text("what macOS leaves")
    found = folder.inventory(tmp_path)
    assert total(found) == 20
    assert found.notes == [
        "1 file passed over: 1 hidden",
        f"1 folder passed over, hidden: {tmp_path}/.ipynb_checkpoints",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_must_not_be_read_is_named(tmp_path):
    write_folder(tmp_path, 20)
    (tmp_path / "lost+found").mkdir(mode=0)
    assert folder.inventory(tmp_path).notes == [
        f"1 folder passed over, permission denied: {tmp_path}/lost+found"
    ]


def test_the_order_is_that_of_the_paths_parts(tmp_path):
    for name in ("a/b.jpg", "a.jpg", "a-b/c.jpg", "b.jpg", "a/a/z.jpg"):
        write_image(tmp_path / name, (40, 40))
    files = folder.inventory(tmp_path).splits
    found = [os.path.relpath(file, tmp_path) for file in [*files["train"], *files["valid"]]]
    assert found == ["a/a/z.jpg", "a/b.jpg", "a-b/c.jpg", "a.jpg", "b.jpg"]


def test_subfolders_named_as_splits_give_the_splits(tmp_path, capsys):
    write_folder(tmp_path / "train" / "cat", 20)
    write_folder(tmp_path / "Val", 4)
    write_folder(tmp_path / "test", 5)
    write_folder(tmp_path / "extra", 3)
    found = inventory("folder", tmp_path)
    assert counts(found) == {"train": 20, "valid": 4, "test": 5}
    assert found.notes == [
        "the sub-folders Val/, test/, train/ give the splits",
        "3 images outside of them passed over",
    ]
    assert find_files(DataConfig("folder", tmp_path)).inventory == found


def test_subfolders_without_a_validation_split(tmp_path):
    write_folder(tmp_path / "train", 20)
    write_folder(tmp_path / "test", 5)
    found = inventory("folder", tmp_path)
    assert counts(found) == {"train": 18, "valid": 2, "test": 5}
    assert "no validation images: every tenth training image is held out for validation" in found.notes


def test_a_subfolder_named_train_alone_is_any_folder(tmp_path):
    write_folder(tmp_path / "train", 20)
    write_folder(tmp_path / "plane", 10)
    assert counts(folder.inventory(tmp_path)) == {"train": 24, "valid": 3, "test": 3}


def test_shards_in_subfolders_give_the_splits_too(tmp_path):
    for split, n in (("train", 6), ("val", 2)):
        images = write_folder(tmp_path / "loose" / split, n)
        (tmp_path / "shards" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / "shards" / split / "0.tar", "w") as tar:
            tar.add(images, "images")
            tar.addfile(tarfile.TarInfo("a.json"))
    found = folder.inventory(tmp_path / "shards")
    assert counts(found) == {"train": 6, "valid": 2, "test": 0}
    assert "2 files passed over: 2 .json" in found.notes


def test_masks_are_announced(tmp_path):
    write_folder(tmp_path / "CelebA-HQ-img", 20, (64, 64))
    for i in range(15):
        write_image(tmp_path / "mask-anno" / str(i % 2) / f"{i}_hair.png", (32, 32), mode="L")
    (note,) = inventory("folder", tmp_path).notes
    assert note.startswith("15 images may be masks (grey or palette, 32 x 32, beside colour, 64 x 64)")
    assert note.endswith(f"{tmp_path}/mask-anno/0, {tmp_path}/mask-anno/1")


def test_grey_images_of_the_same_size_are_no_masks(tmp_path):
    write_folder(tmp_path / "a", 20, (64, 64))
    write_image(tmp_path / "b" / "x.png", (64, 64), mode="L")
    assert inventory("folder", tmp_path).notes == []


# ---- CelebA ------------------------------------------------------------------------------------------------
def test_a_partial_celeba_counts_what_is_absent_and_unlisted(tmp_path):
    images = write_celeba(tmp_path) / "celeba" / "img_align_celeba"
    for name in ("000002.jpg", "000011.jpg"):
        (images / name).unlink()
    write_folder(images / "x", 1)
    for i in range(50):
        write_image(images / f"extra{i}.jpg", (40, 40))
    (images / "Thumbs.db").touch()
    assert inventory("celeba", tmp_path).notes == [
        "2 of 12 listed images are absent",
        "50 images not in the list passed over",
        "2 files passed over: 1 .db, 1 without a suffix",
    ]


@pytest.mark.parametrize("ending", [".png", ".JPG", ".jpeg", ".PNG"])
@pytest.mark.parametrize("every", [1, 2], ids=["all", "half"])
def test_listed_images_are_found_whatever_their_suffix(tmp_path, ending, every):
    images = write_celeba(tmp_path) / "celeba" / "img_align_celeba"
    before = celeba.inventory(tmp_path)
    changed = sorted(images.iterdir())[::every]
    for path in changed:
        path.rename(path.with_suffix(ending))
    found = celeba.inventory(tmp_path)
    assert found.notes == []
    for split, files in found.splits.items():
        assert [celeba.stem(file) for file in files] == [celeba.stem(file) for file in before.splits[split]]
    assert sum(file.endswith(ending) for files in found.splits.values() for file in files) == len(changed)


def test_the_exact_name_comes_before_another_suffix(tmp_path):
    images = write_celeba(tmp_path) / "celeba" / "img_align_celeba"
    write_image(images / "000001.png")
    found = celeba.inventory(tmp_path)
    assert found.splits["train"][0] == str(images / "000001.jpg")
    assert found.notes == ["1 image not in the list passed over"]


def test_an_image_listed_twice_is_used_once(tmp_path):
    base = write_celeba(tmp_path) / "celeba"
    with open(base / "list_eval_partition.txt", "a") as file:
        file.write("000001.jpg 1\n")
    found = celeba.inventory(tmp_path)
    assert counts(found) == {"train": 8, "valid": 2, "test": 2}
    assert found.notes == ["1 image listed twice: the first entry counts"]


def test_an_empty_image_folder_is_an_error(tmp_path, capsys):
    images = write_celeba(tmp_path) / "celeba" / "img_align_celeba"
    for image in images.iterdir():
        image.unlink()
    for command in ("check", "ingest"):
        assert main([command, str(tmp_path)]) == 2
        assert f"{images} holds none of the 12 listed images" in capsys.readouterr().err
    assert train(["--data", "celeba", "--data-root", str(tmp_path)]) == 2


# ---- the same in all three ---------------------------------------------------------------------------------
def test_check_ingest_and_training_print_the_same_inventory(tmp_path, capsys):
    root = write_folder(tmp_path / "images", 20)
    write_files(root, 80, ".xyz")
    caches = ["--cache-dir", str(tmp_path / "cache")]
    tiny = ["--hidden-dims", "4", "8", "--latent-dim", "3", "--batch-size", "4", "--max-steps", "1"]
    tiny += ["--no-compile", "--device", "cpu", "--image-size", "32", "--out", str(tmp_path / "run")]
    for run in (
        lambda: main(["check", str(root)]),
        lambda: main(["ingest", str(root), "--image-size", "32", *caches]),
        lambda: train(["--data", "folder", "--data-root", str(root), *caches, *tiny]),
    ):
        assert run() == 0
        expected = f"{root}: a folder of images; 16 train, 2 valid, 2 test\n  80 files passed over: 80 .xyz\n"
        assert capsys.readouterr().out.count(expected) == 1


def test_not_one_good_image_is_an_error(tmp_path, capsys):
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    assert main(["check", str(tmp_path)]) == 2
    assert "0 of 10 images can be used" in capsys.readouterr().out
    assert main(["ingest", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]) == 2


def test_ingest_refuses_what_training_would(tmp_path, capsys):
    assert main(["ingest", str(write_folder(tmp_path, 2)), "--cache-dir", str(tmp_path / "cache")]) == 2
    assert "holds 1 training images: at least 2 are needed" in capsys.readouterr().err
