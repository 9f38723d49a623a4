"""Convert pixels between files, a model's tensors and pictures."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bvae.errors import UsageError
from bvae.pipelines.arrays import collect
from bvae.reference import scale_pixels


def read_image(
    path: Path, crop: int | None, shape: tuple[int, int, int], pixel_range: tuple[float, float]
) -> Tensor:
    """An image file as [1, C, H, W] in the model's range: upright, cropped to a square, resized.

    Raises:
        OSError: the file is missing or not an image.
        UsageError: the image is smaller than the crop.
    """
    channels, _, side = shape
    with Image.open(path) as image:
        try:
            pixels = collect([image], side, channels, crop)
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from None
    return scale_pixels(pixels.permute(0, 3, 1, 2), pixel_range[0])


def to_uint8(images: Tensor, pixel_range: tuple[float, float]) -> Tensor:
    """Images [N, C, H, W] in the decoder's range to uint8 RGB [N, H, W, 3] on the CPU."""
    low, high = pixel_range
    unit = (images.float() - low) / (high - low)
    pixels = (unit.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return pixels.expand(-1, -1, -1, 3)
