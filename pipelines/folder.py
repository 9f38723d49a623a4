"""Any tree of image files, or of WebDataset's tar shards that hold such files, as a data set."""

import os
from collections.abc import Iterator
from pathlib import Path

from bvae.errors import MissingError
from bvae.paths import expand
from bvae.pipelines.inventory import Inventory
from bvae.pipelines.passed_over import SUFFIXES, PassedOver, plural, suffix
from bvae.pipelines.webdataset import ImageFile, members

SPLIT_OF = {  # by the name of a sub-folder, in lower case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def inventory(root: Path) -> Inventory:
    """The image files by split, sorted by path, and what is passed over.

    Sub-folders train/, val/ and test/ give the splits: train/ and at least one of the others. Otherwise in
    every ten files the fifth is valid and the tenth is test. A tar file is replaced by its members, in the
    tar file's order. Linked folders are read; hidden files and folders, whose names start with a dot, are
    not (macOS leaves ._x.jpg beside x.jpg, and Jupyter copies in .ipynb_checkpoints).

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: a tar file that cannot be read.
    """
    root = expand(root)
    if not root.is_dir():
        raise MissingError(f"no folder at {root}; give the folder of images with --data-root")
    images: list[ImageFile] = []
    passed = PassedOver()
    for path in _walk(str(root), passed):
        kind = suffix(path)
        if kind in SUFFIXES:
            images.append(path)
        elif kind == ".tar":
            images += members(path, passed)
        else:
            passed.add(os.path.basename(path))
    if not images:
        notes = "".join(f"; {note}" for note in passed.notes())
        raise MissingError(f"no image ({', '.join(SUFFIXES)}) under {root}, nor a .tar with one{notes}")
    if found := _by_subfolder(str(root), images):
        return found._replace(notes=found.notes + passed.notes())
    train = [file for i, file in enumerate(images) if i % 10 not in (4, 9)]
    splits = {"train": train, "valid": images[4::10], "test": images[9::10]}
    return Inventory("a folder of images", splits, passed.notes())


def _walk(root: str, passed: PassedOver) -> Iterator[str]:
    """The regular files under root, sorted by the parts of their paths; each folder is read once."""
    base = os.path.realpath(root)
    read: set[str] = set()  # real paths
    stack = [(root, base)]  # (path, real path): of folders; (path, "") of files
    while stack:
        path, real = stack.pop()
        if not real:
            yield path
            continue
        if real in read:
            passed.add_folder(path, "read under another name")
            continue
        read.add(real)
        try:
            with os.scandir(path) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            passed.add_folder(path, (error.strerror or "unreadable").lower())
            continue
        for entry in entries:
            if entry.is_dir():
                if entry.name.startswith("."):
                    passed.add_folder(entry.path, "hidden")
                elif not entry.is_symlink():
                    stack.append((entry.path, os.path.join(real, entry.name)))
                elif _is_inside(base, target := os.path.realpath(entry.path)):
                    passed.add_folder(entry.path, "a link to a folder above it")
                elif _is_inside(target, base) and f"{os.sep}." not in target[len(base) :]:
                    passed.add_folder(entry.path, "a link to a folder that is read")
                else:
                    stack.append((entry.path, target))
            elif entry.name.startswith("."):
                passed.add(entry.name)
            elif entry.is_file():
                stack.append((entry.path, ""))
            else:
                passed.files["broken links" if entry.is_symlink() else "no regular files"] += 1


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _by_subfolder(root: str, images: list[ImageFile]) -> Inventory | None:
    """The splits that sub-folders name; None if they name none."""
    start = len(os.path.join(root, ""))
    tops = [str(file)[start:].partition(os.sep)[0] for file in images]
    split_of = {top: SPLIT_OF.get(top.lower()) for top in set(tops)}
    if not {"train"} < {split for split in split_of.values() if split}:
        return None
    splits: dict[str, list[ImageFile]] = {"train": [], "valid": [], "test": []}
    outside = 0
    for file, top in zip(images, tops, strict=True):
        if split := split_of[top]:
            splits[split].append(file)
        else:
            outside += 1
    names = ", ".join(f"{top}/" for top in sorted(split_of) if split_of[top])
    notes = [f"the sub-folders {names} give the splits"]
    if outside:
        notes.append(f"{plural(outside, 'image')} outside of them passed over")
    return Inventory("a folder of images", splits, notes)
