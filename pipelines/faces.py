"""Drawn faces with known, independent factors, in CelebA's layout: the data set that ships."""

import csv
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bvae import files
from bvae.errors import UsageError
from bvae.owner import LOCK, wait
from bvae.paths import expand
from bvae.pipelines.portrait import CHUNK, FACTORS, boxes, landmarks, render

SCRATCH = ".celeba-"  # beginning of the name of a folder that is being drawn
BOX = ("x_1", "y_1", "width", "height")
LANDMARKS = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")


def sample_factors(n: int, seed: int = 0) -> Tensor:
    """[n, K] independent uniform factors. Face i depends on (seed, i) only: a larger n adds faces and does
    not change the first ones."""
    low, high = torch.tensor([(f.low, f.high) for f in FACTORS]).T
    unit = torch.rand(n, len(FACTORS), generator=torch.Generator().manual_seed(seed))
    binary = torch.tensor([f.kind == "binary" for f in FACTORS])
    return low + (high - low) * torch.where(binary, unit.round(), unit)


def _attributes(factors: Tensor) -> dict[str, Tensor]:
    """Attributes with CelebA's names, from thresholds on the factors: bool [n] each."""
    value = dict(zip((f.name for f in FACTORS), factors.unbind(1), strict=True))
    hair = value["hair_colour"]
    return {
        "Black_Hair": hair < 0.12,
        "Blond_Hair": (hair >= 0.7) & (hair < 0.9),
        "Brown_Hair": (hair >= 0.12) & (hair < 0.5),
        "Eyeglasses": value["glasses"] > 0.5,
        "Gray_Hair": hair >= 0.9,
        "Pale_Skin": value["skin"] < 0.15,
        "Smiling": value["smile"] > 0.25,
        "Young": value["age"] < 0.5,
    }


def write(
    root: str | os.PathLike[str], n: int = 12_000, seed: int = 0, quality: int = 92, progress: bool = True
) -> Path:
    """Write n faces in CelebA's layout to <root>/celeba and return that folder.

    The folder holds images, partition (80 % train, 10 % valid, 10 % test, in order), attributes, identities,
    boxes and landmarks as CelebA does, and factors.csv with the true factors. It is renamed when it is
    complete. The same arguments give the same bytes.

    Raises:
        UsageError: the folder exists, at once or when another process that was drawing it has ended.
        OSError: it cannot be written.
    """
    root = expand(root)
    if not write_missing(root, n, seed, quality, progress):
        raise UsageError(f"{root / 'celeba'} exists already: train on it, remove it, or choose another root")
    return root / "celeba"


def write_missing(root: Path, n: int, seed: int = 0, quality: int = 92, progress: bool = True) -> bool:
    """As `write`, if there is no <root>/celeba; if another process is drawing it, wait for that.

    Returns:
        whether this process drew it.
    """
    target = root / "celeba"
    if target.exists():
        return False
    root.mkdir(parents=True, exist_ok=True)
    with wait(root / f".celeba{LOCK}", "faces"):
        if target.exists():  # drawn while this process waited
            return False
        for left in root.glob(f"{SCRATCH}*"):  # by a process that was killed
            shutil.rmtree(left)
        factors, names = sample_factors(n, seed), [f"{i:06d}.jpg" for i in range(1, n + 1)]
        with tempfile.TemporaryDirectory(dir=root, prefix=SCRATCH) as scratch:
            folder = Path(scratch) / "celeba"
            (folder / "img_align_celeba").mkdir(parents=True)
            _write_tables(folder, names, factors)
            _write_images(folder / "img_align_celeba", names, factors, quality, progress)
            os.sync()  # thousands of files at once: after a power cut, either all or none are there
            folder.rename(target)
            files.sync(root)
    return True


def _write_tables(folder: Path, names: list[str], factors: Tensor) -> None:
    n, attributes = len(names), _attributes(factors)
    splits = (f"{name} {(i >= 0.8 * n) + (i >= 0.9 * n)}\n" for i, name in enumerate(names))
    (folder / "list_eval_partition.txt").write_text("".join(splits))

    signs = (torch.stack(list(attributes.values()), 1).int() * 2 - 1).tolist()
    lines = [" ".join([name, *(f"{s:2d}" for s in row)]) for name, row in zip(names, signs, strict=True)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(n), " ".join(attributes), *lines, ""]))

    identities = "".join(
        f"{name} {i}\n" for i, name in enumerate(names, start=1)
    )  # each face is another person
    (folder / "identity_CelebA.txt").write_text(identities)
    points = [f"{part}_{axis}" for part in LANDMARKS for axis in "xy"]
    _write_numbers(folder / "list_bbox_celeba.txt", ["image_id", *BOX], names, boxes(factors))
    _write_numbers(folder / "list_landmarks_align_celeba.txt", points, names, landmarks(factors))

    with open(folder / "factors.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file", *(f.name for f in FACTORS)])
        for name, row in zip(names, factors.tolist(), strict=True):
            table.writerow([name, *(f"{value:.9g}" for value in row)])  # 9 digits give float32 back exactly


def _write_numbers(path: Path, header: list[str], names: list[str], values: Tensor) -> None:
    """A list in CelebA's form: the number of images, the header, and a line for each image."""
    lines = [f"{name} {' '.join(map(str, row))}" for name, row in zip(names, values.tolist(), strict=True)]
    path.write_text("\n".join([str(len(names)), " ".join(header), *lines, ""]))


def _write_images(folder: Path, names: list[str], factors: Tensor, quality: int, progress: bool) -> None:
    from torchvision.io import encode_jpeg  # takes seconds

    def draw(start: int) -> int:
        chunk = slice(start, start + CHUNK)
        images = render(factors[chunk]).permute(0, 3, 1, 2)
        for name, image in zip(names[chunk], images, strict=True):
            (folder / name).write_bytes(encode_jpeg(image, quality).numpy().tobytes())
        return len(images)

    # One thread of torch per worker: whole chunks in parallel scale better than each operation does.
    pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
    bar = tqdm(total=len(names), desc="faces", unit="image", disable=None if progress else True)
    with bar:
        try:
            for done in pool.map(draw, range(0, len(names), CHUNK)):
                bar.update(done)
        finally:  # after an error or Ctrl-C, do not draw the chunks that wait
            pool.shutdown(cancel_futures=True)
