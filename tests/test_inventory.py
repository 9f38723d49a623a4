"""What a data set holds and what is passed over: the same for check, ingest and training."""

import os
import tarfile
import tracemalloc

import pytest
from pictures import write_celeba, write_folder, write_image

from bvae.config import DataConfig
from bvae.data import main
from bvae.datasets import find_files, inventory
from bvae.errors import UsageError
from bvae.pipelines import celeba, folder
from bvae.pipelines import inventory as module
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


def test_masks_in_the_same_folder_are_announced(tmp_path, monkeypatch):
    for i in range(300):
        write_image(tmp_path / f"{i:03}.png", (16, 16), seed=i)
        write_image(tmp_path / f"{i:03}_mask.png", (8, 8), mode="LP"[i % 2])  # one after the other
    looked_at, original = [], module.look
    monkeypatch.setattr(module, "look", lambda file: looked_at.append(file) or original(file))
    (note,) = inventory("folder", tmp_path).notes
    assert len(looked_at) == module.SAMPLE
    count = sum(file.endswith("_mask.png") for file in looked_at)
    assert note == (
        f"{count} of {module.SAMPLE} images that were looked at in {tmp_path} may be masks "
        "(grey or palette, 8 x 8, beside colour, 16 x 16), and would be used as images"
    )


@pytest.mark.parametrize("sizes", [[(8, 8), (9, 9)], [(16, 16)]], ids=["of several sizes", "of one size"])
def test_grey_photos_in_a_folder_are_no_masks(tmp_path, sizes):
    for i in range(20):
        write_image(tmp_path / f"{i}.jpg", (16, 16), seed=i)
        write_image(tmp_path / f"{i}g.jpg", sizes[i % len(sizes)], mode="L")
    assert inventory("folder", tmp_path).notes == []


def test_headers_alone_are_read(tmp_path):
    """However many files and folders there are, and however long they are."""
    for i in range(2 * module.LOOKED_AT):
        write_image(tmp_path / str(i) / "a.png", (8, 8))
    name = tmp_path / "0" / "a.png"
    with open(name, "ab") as file:
        file.truncate(1 << 29)
    tracemalloc.start()
    try:
        assert module.look(str(name)) == module.Look("RGB", (8, 8))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert inventory("folder", tmp_path).notes == []


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


def move_lists(base, forms):
    """Move the list of splits, and rewrite it by the form's function."""
    for path, form in forms.items():
        lines = (base / "list_eval_partition.txt").read_text().split()
        target = base / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(form(list(zip(lines[::2], lines[1::2], strict=True))))
    if "./list_eval_partition.txt" not in forms:
        (base / "list_eval_partition.txt").unlink()


def as_text(rows):
    return "".join(f"{name} {split}\n" for name, split in rows)


@pytest.mark.parametrize("images", ["Img/img_align_celeba", "Img/img_align_celeba_png", "img_align_celeba"])
@pytest.mark.parametrize("lists", ["Eval", "annotations", "."])
@pytest.mark.parametrize("root", [".", "above", "images"])
def test_the_official_layout(tmp_path, images, lists, root):
    """Img/, Anno/ and Eval/; the root is their folder, the one above, or that of the images."""
    base = write_celeba(tmp_path, "flat").rename(tmp_path.with_name(f"{tmp_path.name}-base"))
    above = tmp_path / "data"
    above.mkdir(parents=True)
    base = base.rename(above / "CelebA")
    (base / "img_align_celeba").rename(base / "moved")
    (base / images).parent.mkdir(exist_ok=True)
    (base / "moved").rename(base / images)
    move_lists(base, {f"{lists}/list_eval_partition.txt": as_text})
    given = {".": base, "above": above, "images": base / images}[root]
    assert celeba.is_at(given)
    found = celeba.inventory(given)
    assert counts(found) == {"train": 8, "valid": 2, "test": 2}
    assert all(os.path.samefile(os.path.dirname(file), base / images) for file in found.splits["train"])


def test_lists_of_another_data_set_are_not_taken(tmp_path):
    base = write_celeba(tmp_path / "mine", "flat")
    (tmp_path / "other").mkdir()
    (base / "list_eval_partition.txt").rename(tmp_path / "other" / "list_eval_partition.txt")
    with pytest.raises(FileNotFoundError, match="without it: --data folder --crop 148"):
        celeba.inventory(base)


CSVS = {
    "plain": lambda rows: "image_id,partition\n" + "".join(f"{n},{s}\n" for n, s in rows),
    "index": lambda rows: (
        ",image_id,partition\n" + "".join(f"{i},{n},{s}\n" for i, (n, s) in enumerate(rows))
    ),
    "quotes": lambda rows: '"image_id","partition"\n' + "".join(f'"{n}","{s}"\n' for n, s in rows),
    "floats": lambda rows: "image_id,partition\r\n" + "".join(f"{n},{s}.0\r\n" for n, s in rows),
    "other order": lambda rows: "image_id,x,partition\n" + "".join(f"{n},7,{s}\n" for n, s in rows),
}


@pytest.mark.parametrize("form", CSVS)
def test_splits_as_pandas_writes_them(tmp_path, form):
    base = write_celeba(tmp_path) / "celeba"
    before = celeba.inventory(tmp_path)
    move_lists(base, {"list_eval_partition.csv": CSVS[form]})
    assert celeba.inventory(tmp_path) == before


def test_a_folder_without_lists_is_told_the_way(tmp_path, capsys):
    base = write_celeba(tmp_path) / "celeba"
    (base / "list_eval_partition.txt").unlink()
    for root in (tmp_path, base, base / "img_align_celeba"):
        assert main(["check", str(root)]) == 2
        assert "without it: --data folder --crop 148" in capsys.readouterr().err
    found = find_files(DataConfig("folder", base / "img_align_celeba", crop=148)).inventory
    assert total(found) == 12


@pytest.mark.parametrize(("size", "crop"), [((178, 218), 148), ((89, 109), 74), ((356, 436), 296)])
def test_the_crop_keeps_its_proportion(tmp_path, size, crop, capsys):
    images = write_celeba(tmp_path) / "celeba" / "img_align_celeba"
    for path in images.iterdir():
        write_image(path, size)
    source = find_files(DataConfig("celeba", tmp_path))
    assert source.picture.crop == crop
    note = f"images of {size[0]} x {size[1]} pixels are cropped to {crop}, as those of 178 x 218 to 148"
    assert source.inventory.notes == ([] if crop == 148 else [note])
    assert main(["check", str(tmp_path)]) == 0
    assert (note in capsys.readouterr().out) == (crop != 148)
    assert find_files(DataConfig("celeba", tmp_path, crop=50)).picture.crop == 50


@pytest.mark.parametrize("sizes", [[(64, 64)], [(256, 256)], [(178, 218), (89, 109)]])
def test_images_of_other_proportions_need_a_crop(tmp_path, sizes, capsys):
    images = write_celeba(tmp_path) / "celeba" / "img_align_celeba"
    for i, path in enumerate(images.iterdir()):
        write_image(path, sizes[i % len(sizes)])
    text = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
    expected = f"the images are {text} pixels, not CelebA's 178 x 218"
    assert main(["check", str(tmp_path)]) == 0
    assert expected in capsys.readouterr().out
    assert main(["ingest", str(tmp_path), "--cache-dir", str(tmp_path / "cache")]) == 2
    assert expected in capsys.readouterr().err
    assert main(["ingest", str(tmp_path), "--crop", "64", "--cache-dir", str(tmp_path / "cache")]) == 0


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


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["000001.jpg", "0 000002.jpg", "1 000003.jpg 0"], "line 1: expected a file name and a split"),
        (["000001.jpg 0 000002.jpg", "1"], "line 1: expected a file name and a split"),
        (["000001.jpg 0", "", "000002.jpg 1 1"], "line 3: expected a file name and a split"),
        (["000001.jpg 0", "../000002.jpg 1"], r"line 2: \.\./000002.jpg is outside the image folder"),
        (["000001.jpg 0", "a\\000002.jpg 1"], "line 2: .* is outside the image folder"),
        (["000001.jpg 0", ".. 1"], "line 2: .. is outside the image folder"),
    ],
)
def test_a_list_with_lines_of_other_lengths_is_refused(tmp_path, lines, message):
    """Read at once, its words could stand in the right order."""
    base = write_celeba(tmp_path) / "celeba"
    (base / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=message):
        celeba.inventory(tmp_path)


def test_the_order_is_the_lists_and_the_first_of_two_entries_counts(tmp_path):
    base = write_celeba(tmp_path) / "celeba"
    numbers = [5, 3, 4, 3, 2, 99]
    lines = [f"{n:06}.jpg {split}\n" for n, split in zip(numbers, [0, 1, 0, 0, 0, 0], strict=True)]
    (base / "list_eval_partition.txt").write_text("".join(lines))
    found = celeba.inventory(tmp_path)
    stems = {split: [os.path.basename(file)[:6] for file in files] for split, files in found.splits.items()}
    assert stems == {"train": ["000005", "000004", "000002"], "valid": ["000003"], "test": []}
    assert found.notes[:2] == [
        "1 of 5 listed images are absent",
        "1 image listed twice: the first entry counts",
    ]
