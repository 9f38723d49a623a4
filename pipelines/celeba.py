"""CelebA on disk: torchvision's layout, Kaggle's, the official one, or a part of them; its official splits.

torchvision: `<root>/celeba/img_align_celeba/000001.jpg`, lists as .txt beside the image folder.
Kaggle: `<root>/img_align_celeba/img_align_celeba/000001.jpg`, lists as .csv beside the outer folder.
official: `<root>/Img/img_align_celeba/000001.jpg`, lists in `<root>/Anno/` and `<root>/Eval/`.
`<root>` may be any folder level of them. Licence of the images: non-commercial research.
"""

import csv
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from bvae.errors import MissingError, UsageError
from bvae.opening import TABLE, NotRead, read_text
from bvae.paths import expand
from bvae.pipelines.inventory import Inventory, look
from bvae.pipelines.passed_over import SUFFIXES, PassedOver, plural, shorten, suffix
from bvae.pipelines.webdataset import ImageFile

LAYOUT = "CelebA's layout"
SPLITS = ("train", "valid", "test")  # by their numbers in the list
SIZE, CROP = (178, 218), 148  # of the images: width and height; PyTorch-VAE's crop, in pixels
LOOKED_AT = 16  # images whose size is read
FOLDERS = ("img_align_celeba", "img_align_celeba_png")
BASES = (".", "celeba", "CelebA", "celebA")  # where they lie, below the root
LEVELS = (".", "Img", "img", "Image", "images")  # and below that
ITEM = ("image_id", "filename", "file_name", "file", "image")  # a CSV's column of file names
SPLIT = ("partition", "split")  # and of splits


def inventory(root: Path) -> Inventory:
    """The paths of the images on disk, by split and in the list's order, and what is passed over.

    A partial copy gives the images that it holds; a split without images gives an empty list.

    Raises:
        FileNotFoundError: no CelebA at root, or none of the listed images; the message says what is missing.
        ValueError: a list file that cannot be read, or that names a file outside the image folder.
    """
    root = expand(root)
    images = _images(root)
    present = frozenset(os.listdir(images))
    names, numbers = _read_partition(list_file := _list_file(root, "list_eval_partition", "the splits"))
    files = match(names, present)
    split_of: dict[str, int] = {}
    if len(files) == len(names):
        split_of = dict(zip(map(files.__getitem__, names), numbers, strict=True))
    if len(split_of) < len(names):  # some are absent, or listed twice: the first entry counts
        split_of = {}
        for name, number in zip(names, numbers, strict=True):
            if name in files:
                split_of.setdefault(files[name], number)
    base = f"{images}{os.sep}"  # as text: 200 000 Paths take a second
    paths: dict[str, list[str]] = {split: [] for split in SPLITS}
    lists = [*paths.values()]
    for file, number in split_of.items():
        lists[number].append(base + file)
    notes = _notes(names, files, set(split_of), present)
    if list_file.parent not in images.parents:
        notes.append(f"the splits are those of {list_file}")
    if not split_of:
        raise MissingError(f"{images} holds none of the {len(names)} listed images; {'; '.join(notes)}")
    return Inventory(LAYOUT, paths, notes)


def match(listed: Sequence[str], present: Iterable[str]) -> dict[str, str]:
    """From names in a list to names of files: the same name, or else the same stem with any image suffix."""
    names = frozenset(present)
    if names.issuperset(listed):
        return dict(zip(listed, listed, strict=True))
    files = {name: name for name in listed if name in names}
    if absent := [name for name in listed if name not in files]:
        stems = {stem(name): name for name in sorted(names, reverse=True) if suffix(name) in SUFFIXES}
        files |= {name: stems[stem(name)] for name in absent if stem(name) in stems}
    return files


def stem(name: str) -> str:
    """A file's name without its suffix."""
    return os.path.splitext(name)[0]


def _notes(names: list[str], files: dict[str, str], used: set[str], present: frozenset[str]) -> list[str]:
    """What is listed but absent, listed twice, present but unlisted, or no image."""
    notes = []
    listed = len(set(names))
    if absent := listed - len(files):
        notes.append(f"{absent} of {listed} listed images are absent")
    if twice := len(names) - absent - len(used):
        notes.append(f"{plural(twice, 'image')} listed twice: the first entry counts")
    passed, unlisted = PassedOver(), 0
    for name in present - used:
        if suffix(name) in SUFFIXES and not name.startswith("."):
            unlisted += 1
        else:
            passed.add(name)
    if unlisted:
        notes.append(f"{plural(unlisted, 'image')} not in the list passed over")
    return notes + passed.notes()


def is_at(root: Path) -> bool:
    """Whether a folder holds CelebA's images, or is their folder."""
    return _find_images(expand(root)) is not None


def fitting_crop(files: Sequence[ImageFile]) -> tuple[int, list[str]]:
    """The side of the crop in pixels: 148 of 178 x 218, and as much of another size in this proportion.

    Returns:
        the side, and a note if it is another than 148.

    Raises:
        UsageError: other proportions, or several sizes: only the user knows what part of them to use.
    """
    some = [files[i * len(files) // LOOKED_AT] for i in range(LOOKED_AT)] if files else []
    sizes = sorted({found.size for file in some if (found := look(file))})
    if sizes in ([], [SIZE]):
        return CROP, []
    text = shorten(f"{width} x {height}" for width, height in sizes)
    width, height = sizes[0]
    side = round(CROP * width / SIZE[0])
    if len(sizes) > 1 or abs(height - width * SIZE[1] / SIZE[0]) > 1:
        raise UsageError(
            f"the images are {text} pixels, not CelebA's 178 x 218, which are cropped to 148: "
            f"name the side of the centred square with --crop ({min(sizes[0])} is the largest)"
        )
    return side, [f"images of {text} pixels are cropped to {side}, as those of 178 x 218 to 148"]


def attributes(root: Path) -> tuple[list[str], dict[str, list[int]]]:
    """The names of the attributes, and for each listed image whether it has them: 1 or -1.

    Raises:
        FileNotFoundError: no CelebA at root, or no list of attributes.
        ValueError: the list cannot be read; the message names the line.
    """
    path = _list_file(expand(root), "list_attr_celeba", "the attributes")
    lines = _read_lines(path)
    if path.suffix == ".csv":
        names, table = _read_csv(path, lines)
    else:  # the number of images comes before the names
        if len(lines) > 1 and suffix(lines[1].partition(" ")[0]) in SUFFIXES:
            raise UsageError(
                f"{path}, line 1: expected the number of images, which this copy lacks, "
                f"got {lines[0][:40]!r}: put a line with {len(lines) - 1} before it"
            )
        names = lines[1].split() if len(lines) > 1 else []
        table = [(number, line.split()) for number, line in enumerate(lines[2:], start=3)]
    rows = {}
    for number, words in table:
        if not words:
            continue
        if len(words) != 1 + len(names) or not set(words[1:]) <= {"1", "-1"}:
            raise UsageError(
                f"{path}, line {number}: expected a file name and {len(names)} times 1 or -1, "
                f"got {' '.join(words)[:80]!r}"
            )
        rows[words[0]] = [int(word) for word in words[1:]]
    return names, rows


def _find_images(root: Path) -> Path | None:
    """The folder of the images."""
    if root.resolve().name in FOLDERS and not any((root / name).is_dir() for name in FOLDERS):
        return root
    for base in BASES[1:] + BASES[:1]:
        for level in LEVELS:
            for name in FOLDERS:
                images = root / base / level / name
                if (images / name).is_dir():  # Kaggle's
                    return images / name
                if images.is_dir():
                    return images
    return None


def _images(root: Path) -> Path:
    """The folder of the images. Raises FileNotFoundError, which says what is missing."""
    if not root.is_dir():
        raise MissingError(f"no folder at {root}; give CelebA's folder with --data-root")
    if images := _find_images(root):
        return images
    for base in (root / base / level for base in BASES for level in LEVELS):
        for archive in (base / f"{name}{end}" for name in FOLDERS for end in (".zip", ".7z", ".7z.001")):
            if not archive.is_file():
                continue
            if archive.suffix != ".zip" or zipfile.is_zipfile(archive):
                raise MissingError(f"{archive} is not unpacked yet: unzip it in {base}")
            raise MissingError(
                f"{archive} is not a zip file. Downloads often save a 'quota exceeded' page under its name: "
                "delete it and download the archive again"
            )
    raise MissingError(f"neither {root} nor {root / 'celeba'} holds a folder img_align_celeba/")


def _read_partition(path: Path) -> tuple[list[str], list[int]]:
    """The file names and the split numbers of all listed images."""
    lines = _read_lines(path)
    if plain := _read_plain(lines):
        return plain
    table: Iterable[tuple[int, list[str]]]
    if path.suffix == ".csv":
        columns, table = _read_csv(path, lines)
        column = next((columns.index(name) + 1 for name in columns if name.lower() in SPLIT), None)
        if column is None:
            raise UsageError(f"{path}: expected the header image_id,partition, got {lines[0]!r}")
        table = [(number, [words[0], *words[column : column + 1]]) for number, words in table if words]
    else:
        table = ((number, line.split()) for number, line in enumerate(lines, start=1))  # not 200 000 at once
    names, splits = [], []
    for number, words in table:
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise UsageError(
                f"{path}, line {number}: expected a file name and a split, 0 (train), 1 (valid) or 2 (test), "
                f"got {' '.join(words)!r}"
            )
        if "/" in words[0] or "\\" in words[0] or words[0] == "..":
            raise UsageError(f"{path}, line {number}: {words[0]} is outside the image folder")
        names.append(words[0])
        splits.append(int(words[1]))
    return names, splits


def _read_plain(lines: list[str]) -> tuple[list[str], list[int]] | None:
    """The list if all of it is as CelebA's, three times as fast as line by line; None if a line is not."""
    text = "\n".join(lines)
    words = text.split()
    names, splits = words[::2], words[1::2]
    if (
        not len(names) == len(splits) == len(lines)
        or not {"0", "1", "2"}.issuperset(splits)
        or [*map(" ".join, zip(names, splits, strict=True))] != lines
        or ("/" in text or "\\" in text or ".." in names)
    ):
        return None
    return names, [*map(int, splits)]


def _read_csv(path: Path, lines: list[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header without the file names' column, and each row with its line: the file name comes first.

    pandas writes an index before the file names, which is left out, and integers as 1.0 if some are missing.
    """
    reader = csv.reader(lines)
    try:
        header = [name.strip() for name in next(reader)]
        first = next((i for i, name in enumerate(header) if name.lower() in ITEM), 0)
        rows = []
        for row in reader:
            words = [word.strip().removesuffix(".0") for word in row[first:]]
            rows.append((reader.line_num, words if any(words) else []))
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    return header[first + 1 :], rows


def _list_file(root: Path, name: str, content: str) -> Path:
    """torchvision's list or Kaggle's: near the images, or in another folder below the root."""
    images = _images(root)
    bases = [folder for folder in (images, *images.parents) if folder == root or root in folder.parents]
    bases += [root / base for base in BASES[1:]]
    levels = 2 if root.resolve().name in FOLDERS else 1 if root.resolve().name in LEVELS else 0
    bases += root.resolve().parents[:levels]  # root is a folder inside of CelebA's
    for pattern in (name, f"*/{name}"):
        for base in bases:
            if pattern != name and base == images:
                continue  # 200 000 files to go through
            for end in ("txt", "csv"):
                if found := sorted(base.glob(f"{pattern}.{end}")):
                    return found[0]
    base = images.parent.parent if images.parent.name == images.name else images.parent
    hint = "" if name != "list_eval_partition" else "; without it: --data folder --crop 148"
    raise MissingError(f"{base} holds no {name}.txt (or .csv), which gives {content}{hint}")


def _read_lines(path: Path) -> list[str]:
    """Raises ValueError for an empty file, or one that is not text."""
    try:
        lines = read_text(path, TABLE).splitlines()
    except NotRead:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not any(line.strip() for line in lines):
        raise UsageError(f"{path} is empty")
    return lines
