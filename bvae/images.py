"""Pixels between files, a model's tensors and pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bvae.errors import UsageError
from bvae.reference import scale_pixels


def read_image(
    path: Path, crop: int | None, shape: tuple[int, int, int], pixel_range: tuple[float, float]
) -> Tensor:
    """An image file as [1, C, H, W] in the model's range: turned upright, the centred square, resized.

    Raises:
        OSError: the file is missing or no image.
        ValueError: the image is smaller than the crop.
    """
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened).convert("L" if shape[0] == 1 else "RGB")
    side = crop or min(upright.size)
    if side > min(upright.size):
        width, height = upright.size
        raise UsageError(f"{path}: {width} x {height} pixels are smaller than the crop of {side}")
    left, top = (round((length - side) / 2) for length in upright.size)
    square = upright.crop((left, top, left + side, top + side))
    pixels = np.array(square.resize(shape[1:], Image.Resampling.BILINEAR)).reshape(1, *shape[1:], shape[0])
    return scale_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2), pixel_range[0])


def to_uint8(images: Tensor, pixel_range: tuple[float, float]) -> Tensor:
    """Images [N, C, H, W] in the decoder's range to uint8 RGB [N, H, W, 3] on the CPU."""
    low, high = pixel_range
    unit = (images.float() - low) / (high - low)
    pixels = (unit.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return pixels.expand(-1, -1, -1, 3)
