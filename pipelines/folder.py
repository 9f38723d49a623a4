"""Any tree of JPEG and PNG files, or of WebDataset's tar shards that hold such files, as a data set."""

from pathlib import Path

from bvae.errors import MissingError
from bvae.pipelines.webdataset import ImageFile, members

SUFFIXES = (".jpg", ".jpeg", ".png")


def splits(root: Path) -> dict[str, list[ImageFile]]:
    """The image files by split, sorted by path: in every ten, the fifth is valid and the tenth is test.

    A tar file is replaced by its members, in the tar file's order.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: a tar file that cannot be read.
    """
    if not Path(root).is_dir():
        raise MissingError(f"no folder at {root}; give the folder of images with --data-root")
    images: list[ImageFile] = []
    for path in sorted(Path(root).rglob("*")):
        if path.name.startswith("."):  # macOS leaves ._x.jpg beside x.jpg
            continue
        if path.suffix.lower() in SUFFIXES and path.is_file():
            images.append(str(path))
        elif path.suffix.lower() == ".tar" and path.is_file():
            images += members(path, SUFFIXES)
    if not images:
        raise MissingError(f"no image ({', '.join(SUFFIXES)}) under {root}, nor a .tar with one")
    train = [file for i, file in enumerate(images) if i % 10 not in (4, 9)]
    return {"train": train, "valid": images[4::10], "test": images[9::10]}
