"""Convert pixels between files, a model's tensors and pictures."""

from pathlib import Path

import torch
from torch import Tensor

from bvae.errors import UsageError
from bvae.pipelines.decoder import reason
from bvae.pipelines.picture import Picture
from bvae.pipelines.webdataset import read
from bvae.reference import scale_pixels


def read_image(
    path: Path, crop: int | None, shape: tuple[int, int, int], pixel_range: tuple[float, float]
) -> Tensor:
    """An image file as [1, C, H, W] in the model's range: upright, cropped to a square, resized.

    The pixels are those that training reads.

    Raises:
        OSError: the file is missing.
        UsageError: it is not an image, damaged, or smaller than the crop.
    """
    from bvae.pipelines.torch_decode import decode_bytes  # torchvision takes seconds

    channels, _, side = shape
    try:
        pixels = decode_bytes(read(str(path)), Picture(crop, side, channels))
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{path}: {reason(error)}") from None
    return scale_pixels(pixels[None].permute(0, 3, 1, 2), pixel_range[0])


def to_uint8(images: Tensor, pixel_range: tuple[float, float]) -> Tensor:
    """Images [N, C, H, W] in the decoder's range to uint8 RGB [N, H, W, 3] on the CPU."""
    low, high = pixel_range
    unit = (images.float() - low) / (high - low)
    pixels = (unit.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return pixels.expand(-1, -1, -1, 3)
