"""A Pillow image's pixels: the same rule for files, Datasets and single pictures."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "F")


def pixels(image: Image.Image, channels: int | None = None) -> NDArray[np.uint8]:
    """An image rotated upright (EXIF), as uint8 [H, W, channels]; 16-bit values keep their upper 8 bits.

    Args:
        channels: 1 (grey) or 3 (RGB). None: 1 for grey images, else 3.

    Raises:
        OSError, SyntaxError: the file behind the image is damaged.
    """
    channels = channels or (1 if image.mode in GREY else 3)
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255
        upright = Image.fromarray((np.array(upright) >> 8).astype(np.uint8))
    array = np.array(upright.convert("RGB" if channels == 3 else "L"))
    return array.reshape(*array.shape[:2], channels)
