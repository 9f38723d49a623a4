"""Image files to uint8 batches with torchvision, on the CPU's cores."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

SHOWN = 10  # bad files named in an error message


def decode_file(path: Path, crop: int | None, size: int, channels: int) -> Tensor:
    """One image as uint8 [size, size, channels].

    The centred square of `crop` pixels (None: the largest that fits) is resized by antialiased bilinear
    interpolation, as torchvision's `CenterCrop` and `Resize` do. EXIF rotation is applied.

    Raises:
        ValueError: the image is smaller than the crop.
        RuntimeError: the file is not an image that torchvision decodes.
    """
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    image = decode_image(read_file(str(path)), mode=mode, apply_exif_orientation=True)
    height, width = image.shape[1:]
    side = crop or min(height, width)
    if side > min(height, width):
        raise ValueError(f"{width} x {height} pixels are smaller than the crop of {side}: lower --crop")
    square = F.center_crop(image, [side, side])
    return F.resize(square, [size, size], antialias=True).permute(1, 2, 0)


def decode(files: Sequence[Path], crop: int | None, size: int, channels: int, label: str) -> Tensor:
    """All files as uint8 [N, size, size, channels] in their order, with a progress bar on a terminal.

    Raises:
        ValueError: files that cannot be decoded; all are read first, then the message counts and names them.
    """
    out = torch.empty(len(files), size, size, channels, dtype=torch.uint8)
    bad: list[str] = []

    def work(i: int) -> None:
        try:
            out[i] = decode_file(files[i], crop, size, channels)
        except (RuntimeError, ValueError, OSError) as error:
            bad.append(f"{files[i]}: {str(error).splitlines()[0]}")

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(files), desc=label, unit=" images", disable=None) as bar,
    ):
        for _ in pool.map(work, range(len(files))):
            bar.update()
    if bad:
        shown = "\n  ".join(sorted(bad)[:SHOWN])
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(
            f"{len(bad)} of {len(files)} images cannot be used:\n  {shown}{more}\nMend or remove them"
        )
    return out
