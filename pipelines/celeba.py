"""CelebA on disk: torchvision's layout, Kaggle's, or a part of either, and its official splits.

torchvision: `<root>/celeba/img_align_celeba/000001.jpg`, lists as .txt beside the image folder.
Kaggle: `<root>/img_align_celeba/img_align_celeba/000001.jpg`, lists as .csv beside the outer folder.
`<root>` may be either folder level of both. Licence of the images: non-commercial research.
"""

import zipfile
from pathlib import Path

SPLITS = {"train": 0, "valid": 1, "test": 2}


def files(root: Path, split: str) -> list[Path]:
    """The image files of a split that are there, in the list's order.

    A partial copy gives what it holds; a copy without images of the valid or test split gives an empty list.

    Raises:
        FileNotFoundError: no CelebA at root; the message says what was looked for.
        ValueError: an unknown split, or a list file that cannot be read.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}', expected one of {', '.join(SPLITS)}")
    base, images = _locate(Path(root))
    present = {entry.name for entry in images.iterdir()}
    partition = _read_partition(base)
    return [images / name for name, number in partition if number == SPLITS[split] and name in present]


def _locate(root: Path) -> tuple[Path, Path]:
    """The folder of the lists and the folder of the images."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}; give CelebA's folder with --data-root")
    for base in (root / "celeba", root):
        images = base / "img_align_celeba"
        for folder in (images / "img_align_celeba", images):
            if folder.is_dir():
                return base, folder
        archive = base / "img_align_celeba.zip"
        if archive.is_file():
            if zipfile.is_zipfile(archive):
                raise FileNotFoundError(f"{archive} is not unpacked yet: unzip it in {base}")
            raise FileNotFoundError(
                f"{archive} is not a zip file. Downloads often save a 'quota exceeded' page under its name: "
                "delete it and download the archive again"
            )
    raise FileNotFoundError(f"{root} holds no img_align_celeba/ folder, nor does {root / 'celeba'}")


def _read_partition(base: Path) -> list[tuple[str, int]]:
    """(file name, split number) of every listed image."""
    path = next(
        (p for p in (base / f"list_eval_partition.{end}" for end in ("txt", "csv")) if p.is_file()), None
    )
    if path is None:
        raise FileNotFoundError(f"{base} holds no list_eval_partition.txt (or .csv), which gives the splits")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if path.suffix == ".csv":
        lines = [line.replace(",", " ") for line in lines[1:]]  # image_id,partition
    partition = []
    for number, line in enumerate(lines, start=2 if path.suffix == ".csv" else 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise ValueError(
                f"{path}, line {number}: expected a file name and a split, 0 (train), 1 (valid) or 2 (test), "
                f"got {line!r}"
            )
        partition.append((words[0], int(words[1])))
    return partition
