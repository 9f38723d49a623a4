"""Any tree of JPEG and PNG files as a data set."""

from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png")
SPLITS = ("train", "valid", "test")


def files(root: Path, split: str) -> list[Path]:
    """The image files of a split, sorted by path: of every ten, the fifth is valid, the tenth test.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}', expected one of {', '.join(SPLITS)}")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no folder at {root}; give the folder of images with --data-root")
    images = sorted(path for path in Path(root).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not images:
        raise FileNotFoundError(f"no image ({', '.join(SUFFIXES)}) under {root}")
    place = {"valid": 4, "test": 9}
    if split == "train":
        return [path for i, path in enumerate(images) if i % 10 not in place.values()]
    return images[place[split] :: 10]
