"""The rule from image files to pixels, the same for all decoders, and the check of a file's header."""

import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

MAX_PIXELS = 80_000_000  # a larger image may be a decompression bomb
MAX_SCANS = 30  # of a progressive JPEG: each visits all pixels, and a few bytes are enough to ask for one
ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Picture:
    """The rule from an image file to uint8 [size, size, channels].

    EXIF rotation is applied. The centred square of `crop` pixels (None: the largest that fits) is cropped as
    by torchvision's `CenterCrop` and resized by antialiased bilinear interpolation, PIL's `BILINEAR`. 16-bit
    values keep their upper 8 bits, transparency is dropped, grey becomes three equal channels, CMYK is
    converted to RGB.
    """

    crop: int | None
    size: int
    channels: int

    def square(self, width: int, height: int) -> tuple[int, int, int]:
        """Top, left and side of the cropped square, in pixels.

        Raises:
            ValueError: the image is smaller than the crop.
        """
        side = self.crop or min(width, height)
        if side > min(width, height):
            raise ValueError(f"{width} x {height} pixels are smaller than the crop of {side}: lower --crop")
        return round((height - side) / 2), round((width - side) / 2), side


class Header(NamedTuple):
    """What an image file's header says."""

    kind: Literal["jpeg", "png"]
    width: int
    height: int
    plain: bool  # an upright 8-bit grey or YCbCr JPEG, which all decoders decode in the same way


def inspect(data: bytes) -> Header:
    """Read the header of a JPEG or PNG file, and check as far as possible without decoding that it is whole.

    A flipped bit in the compressed data of a JPEG usually gives another valid JPEG: only PNG has checksums.

    Raises:
        ValueError: not an image, truncated, a broken header or too many pixels; the message says which.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            header = _jpeg(data)
        elif data.startswith(b"\x89PNG\r\n\x1a\n"):
            header = _png(data)
        else:
            raise ValueError(_describe_other_file(data))
    except (struct.error, IndexError):
        raise ValueError("truncated in its header") from None
    if header.width * header.height > MAX_PIXELS:
        raise ValueError(f"{header.width} x {header.height} pixels are more than {MAX_PIXELS:,}: not decoded")
    if header.width * header.height == 0:
        raise ValueError("broken header: an image without pixels")
    return header


def _describe_other_file(data: bytes) -> str:
    if not data:
        return "empty"
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head")):
        return "a web page instead of an image: a download that failed"
    if start.startswith(b"pk\x03\x04"):
        return "a zip archive instead of an image: unpack it"
    return "neither JPEG nor PNG"


def _jpeg(data: bytes) -> Header:
    """Walk the segments up to the compressed data."""
    width = height = components = 0
    plain, progressive, at = True, False, 2
    while True:
        if data[at] != 0xFF:
            raise ValueError("broken header: no JPEG marker where one belongs")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if (
            marker <= 0x01 or 0xD0 <= marker <= 0xD8 or length < 2
        ):  # decoders would continue at another place than this function
            raise ValueError("broken header: a JPEG marker where none belongs")
        body = at + 4
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, components = struct.unpack_from(">BHHB", data, body)
            plain &= marker <= 0xC2 and bits == 8 and components in (1, 3)
            progressive |= marker & 3 == 2
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", body):
            plain &= _upright(data[body + 6 : at + 2 + length])
        elif marker == 0xEE and data.startswith(b"Adobe", body):
            plain &= data[body + 11] == 1  # the transform: YCbCr
        elif marker == 0xDA:
            break
        elif marker == 0xD9:
            raise ValueError("broken header: a JPEG without an image")
        at += 2 + length
    if not components:
        raise ValueError("broken header: a JPEG without an image")
    # In compressed data, 0 or a restart marker follows 0xFF: the end marker cannot appear by chance.
    if data.rfind(b"\xff\xd9", at) < 0:
        raise ValueError("truncated: the end of the JPEG is missing")
    if progressive and (scans := data.count(b"\xff\xda", at)) > MAX_SCANS:
        raise ValueError(f"{scans} scans are more than {MAX_SCANS}: not decoded")
    return Header("jpeg", width, height, plain)


def _upright(tiff: bytes) -> bool:
    """Whether EXIF data ask for no rotation. False if they cannot be read."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (first,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, first)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, first + 2 + 12 * entry)
            if tag == ORIENTATION:
                return value == 1
    except (KeyError, struct.error):
        return False
    return True


def _png(data: bytes) -> Header:
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length != 13:
        raise ValueError("broken header: a PNG without IHDR")
    if data.rfind(b"IEND") < 0:
        raise ValueError("truncated: the end of the PNG is missing")
    return Header("png", width, height, plain=False)
