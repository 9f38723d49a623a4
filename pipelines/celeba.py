"""CelebA on disk: torchvision's layout, Kaggle's, or a part of either, and its official splits.

torchvision: `<root>/celeba/img_align_celeba/000001.jpg`, lists as .txt beside the image folder.
Kaggle: `<root>/img_align_celeba/img_align_celeba/000001.jpg`, lists as .csv beside the outer folder.
`<root>` may be either folder level of both. Licence of the images: non-commercial research.
"""

import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from bvae.errors import MissingError, UsageError
from bvae.pipelines.inventory import Inventory
from bvae.pipelines.passed_over import SUFFIXES, PassedOver, plural, suffix

SPLITS = ("train", "valid", "test")  # by their numbers in the list


def inventory(root: Path) -> Inventory:
    """The paths of the images on disk, by split and in the list's order, and what is passed over.

    A partial copy gives the images that it holds; a split without images gives an empty list.

    Raises:
        FileNotFoundError: no CelebA at root, or none of the listed images; the message says what is missing.
        ValueError: a list file that cannot be read, or that names a file outside the image folder.
    """
    base, images = _locate(Path(root))
    present = os.listdir(images)
    partition = _read_partition(base)
    files = match([name for name, _ in partition], present)
    paths: dict[str, list[str]] = {split: [] for split in SPLITS}
    used: set[str] = set()
    for name, number in partition:
        file = files.get(name)
        if file is not None and file not in used:
            used.add(file)
            paths[SPLITS[number]].append(f"{images}{os.sep}{file}")  # as text: 200 000 Paths take a second
    notes = _notes(partition, files, used, present)
    if not used:
        raise MissingError(f"{images} holds none of the {len(partition)} listed images; {'; '.join(notes)}")
    return Inventory("CelebA's layout", paths, notes)


def match(listed: Sequence[str], present: Iterable[str]) -> dict[str, str]:
    """From names in a list to names of files: the same name, or else the same stem with any image suffix."""
    names = set(present)
    files = {name: name for name in listed if name in names}
    if absent := [name for name in listed if name not in files]:
        stems = {stem(name): name for name in sorted(names, reverse=True) if suffix(name) in SUFFIXES}
        files |= {name: stems[stem(name)] for name in absent if stem(name) in stems}
    return files


def stem(name: str) -> str:
    """A file's name without its suffix."""
    return os.path.splitext(name)[0]


def _notes(
    partition: list[tuple[str, int]], files: dict[str, str], used: set[str], present: list[str]
) -> list[str]:
    """What is listed but absent, listed twice, present but unlisted, or no image."""
    notes = []
    listed = {name for name, _ in partition}
    if absent := len(listed) - len(files):
        notes.append(f"{absent} of {len(listed)} listed images are absent")
    if twice := len(partition) - absent - len(used):
        notes.append(f"{plural(twice, 'image')} listed twice: the first entry counts")
    passed, unlisted = PassedOver(), 0
    for name in present:
        if name in used:
            continue
        if suffix(name) in SUFFIXES and not name.startswith("."):
            unlisted += 1
        else:
            passed.add(name)
    if unlisted:
        notes.append(f"{plural(unlisted, 'image')} not in the list passed over")
    return notes + passed.notes()


def attributes(root: Path) -> tuple[list[str], dict[str, list[int]]]:
    """The names of the attributes, and for each listed image whether it has them: 1 or -1.

    Raises:
        FileNotFoundError: no CelebA at root, or no list of attributes.
        ValueError: the list cannot be read; the message names the line.
    """
    base, _ = _locate(Path(root))
    path = _list_file(base, "list_attr_celeba", "the attributes")
    lines = _read_lines(path)
    if path.suffix == ".csv":
        lines = [line.replace(",", " ") for line in lines]
        names, first = lines[0].split()[1:], 1
    else:  # the number of images comes before the names
        names, first = lines[1].split() if len(lines) > 1 else [], 2
    rows = {}
    for number, line in enumerate(lines[first:], start=first + 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 1 + len(names) or not set(words[1:]) <= {"1", "-1"}:
            raise UsageError(
                f"{path}, line {number}: expected a file name and {len(names)} times 1 or -1, "
                f"got {line[:80]!r}"
            )
        rows[words[0]] = [int(word) for word in words[1:]]
    return names, rows


def _locate(root: Path) -> tuple[Path, Path]:
    """The folder of the lists and the folder of the images."""
    if not root.is_dir():
        raise MissingError(f"no folder at {root}; give CelebA's folder with --data-root")
    for base in (root / "celeba", root):
        images = base / "img_align_celeba"
        for folder in (images / "img_align_celeba", images):
            if folder.is_dir():
                return base, folder
        archive = base / "img_align_celeba.zip"
        if archive.is_file():
            if zipfile.is_zipfile(archive):
                raise MissingError(f"{archive} is not unpacked yet: unzip it in {base}")
            raise MissingError(
                f"{archive} is not a zip file. Downloads often save a 'quota exceeded' page under its name: "
                "delete it and download the archive again"
            )
    raise MissingError(f"neither {root} nor {root / 'celeba'} holds a folder img_align_celeba/")


def _read_partition(base: Path) -> list[tuple[str, int]]:
    """(file name, split number) of every listed image."""
    path = _list_file(base, "list_eval_partition", "the splits")
    lines = _read_lines(path)
    if path.suffix == ".csv":
        if lines[0].strip() != "image_id,partition":
            raise UsageError(f"{path}: expected the header image_id,partition, got {lines[0]!r}")
        lines = [line.replace(",", " ") for line in lines[1:]]
    partition = []
    for number, line in enumerate(lines, start=2 if path.suffix == ".csv" else 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise UsageError(
                f"{path}, line {number}: expected a file name and a split, 0 (train), 1 (valid) or 2 (test), "
                f"got {line!r}"
            )
        if "/" in words[0] or "\\" in words[0] or words[0] == "..":
            raise UsageError(f"{path}, line {number}: {words[0]} is outside the image folder")
        partition.append((words[0], int(words[1])))
    return partition


def _list_file(base: Path, name: str, content: str) -> Path:
    """torchvision's list or Kaggle's."""
    for end in ("txt", "csv"):
        if (base / f"{name}.{end}").exists():
            return base / f"{name}.{end}"
    raise MissingError(f"{base} holds no {name}.txt (or .csv), which gives {content}")


def _read_lines(path: Path) -> list[str]:
    """Raises ValueError for an empty file, or one that is not text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not any(line.strip() for line in lines):
        raise UsageError(f"{path} is empty")
    return lines
