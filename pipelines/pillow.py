"""A Pillow image's pixels: the same rule for files, Datasets and single pictures."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "F")


def pixels(image: Image.Image, channels: int | None = None) -> NDArray[np.uint8]:
    """An image rotated upright (EXIF), as uint8 [H, W, channels]; 16-bit values keep their upper 8 bits.

    Transparent pixels are composited on white: the colours that they hide are not those one sees. Of an
    animation it is the first frame.

    Args:
        channels: 1 (grey) or 3 (RGB). None: 1 for grey images, else 3.

    Raises:
        OSError, SyntaxError: the file behind the image is damaged.
    """
    channels = channels or (1 if image.mode in GREY else 3)
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255
        values = np.array(upright)
        hidden = values == upright.info.get("transparency", -1)
        upright = Image.fromarray(np.where(hidden, 255, values >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        image = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    array = np.array(upright.convert("RGB" if channels == 3 else "L"))
    return array.reshape(*array.shape[:2], channels)


def without_text(png: bytes) -> bytes:
    """A PNG without its texts and colour profile: Pillow refuses the file if they are long or damaged."""
    kept, at = [png[:8]], 8
    while at + 8 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(png[at:end])
        at = end
    return b"".join(kept)
