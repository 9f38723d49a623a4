"""The rule from image files to pixels, the same for all decoders, and the check of a file's header."""

import io
import struct
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 80_000_000  # a larger image may be a decompression bomb
MAX_SCANS = 30  # of a progressive JPEG: each visits all pixels, and a few bytes are enough to ask for one
ORIENTATION = 0x0112  # the EXIF tag
PILLOW = ("WEBP", "BMP", "GIF", "TIFF", "AVIF")  # formats that Pillow alone reads, by its names
NOT_READ = "which is not read: convert it to JPEG or PNG"
STARTS = {  # first bytes: format, or what it is instead
    b"\xff\xd8": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\xff\x0a": f"JPEG XL, {NOT_READ}",
    b"\0\0\0\x0cJXL ": f"JPEG XL, {NOT_READ}",
    b"\0\0\0\x0cjP  ": f"JPEG 2000, {NOT_READ}",
    b"8BPS": f"a Photoshop file, {NOT_READ}",
    b"PK\x03\x04": "a zip archive instead of an image: unpack it",
    b"%PDF": "a PDF instead of an image",
    b"version https://git-lfs": "a pointer of Git LFS instead of an image: run `git lfs pull`",
}


@dataclass(frozen=True)
class Picture:
    """The rule from an image file to uint8 [size, size, channels].

    EXIF rotation is applied. The centred square of `crop` pixels (None: the largest that fits) is cropped as
    by torchvision's `CenterCrop` and resized by antialiased bilinear interpolation, PIL's `BILINEAR`. 16-bit
    values keep their upper 8 bits, transparent pixels are composited on white, grey becomes three equal
    channels, CMYK is converted to RGB. Of an animation the first frame counts.
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

    kind: str  # "JPEG", or the name of the format in Pillow
    width: int
    height: int
    plain: bool  # an upright 8-bit grey or YCbCr JPEG, which all decoders decode in the same way


def inspect(data: bytes) -> Header:
    """Read the header of an image file, and check as far as possible without decoding that it is whole.

    The file's first bytes tell the format, whatever its suffix. A flipped bit in the compressed data of a
    JPEG usually gives another valid JPEG: only PNG has checksums.

    Raises:
        ValueError: not an image, truncated, a broken header or too many pixels; the message says which.
    """
    try:
        kind = identify(data)
        if kind == "JPEG":
            header = _jpeg(data)
        elif kind == "PNG":
            header = _png(data)
        elif kind in PILLOW:
            header = _by_pillow(data, kind)
        else:
            raise ValueError(kind)
    except (struct.error, IndexError):
        raise ValueError("truncated in its header") from None
    if header.width * header.height > MAX_PIXELS:
        raise ValueError(f"{header.width} x {header.height} pixels are more than {MAX_PIXELS:,}: not decoded")
    if header.width * header.height == 0:
        raise ValueError("broken header: an image without pixels")
    return header


def identify(data: bytes) -> str:
    """The name of the format, by the first bytes; of any other file, what it is instead of an image."""
    if not data:
        return "empty"
    if data[4:8] == b"ftyp":  # ISO media: the brand tells which
        brand = data[8:12]
        if brand in (b"avif", b"avis"):
            return "AVIF"
        if brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
            return f"HEIC, {NOT_READ}"
        return "a video instead of an image"
    if data[:4] == b"RIFF":
        return "WEBP" if data[8:12] == b"WEBP" else "a sound or a video instead of an image"
    for start, kind in STARTS.items():
        if data.startswith(start):
            return kind
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head")):
        return "a web page instead of an image: a download that failed"
    if b"<svg" in start:
        return f"SVG, {NOT_READ}"
    return f"no image: neither {', '.join(['JPEG', 'PNG', *PILLOW[:-1]])} nor {PILLOW[-1]}"


def _by_pillow(data: bytes, kind: str) -> Header:
    """The header of a format that only Pillow reads."""
    if kind == "WEBP" and 8 + int.from_bytes(data[4:8], "little") > len(data):
        raise ValueError("truncated: the end of the WEBP is missing")
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            return Header(kind, *image.size, plain=False)
    except UnidentifiedImageError:
        raise ValueError(f"broken {kind}, or Pillow was built without it") from None
    except Exception as error:  # each kind of damage raises another type
        raise ValueError(f"broken {kind}: {error}") from None


def _jpeg(data: bytes) -> Header:
    """Walk the segments up to the compressed data, as libjpeg does.

    libjpeg skips bytes between segments. Other decoders may not: such a file is not plain.
    """
    width = height = components = 0
    plain, progressive, at = True, False, 2
    while True:
        start = at
        while data[at] != 0xFF or data[at + 1] in (0x00, 0xFF):  # stray, stuffed and fill bytes
            at = data.find(b"\xff", at + 1) % (len(data) + 1)  # none: behind the end
        marker = data[at + 1]
        plain &= not data[start:at].strip(b"\xff")
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a length
            plain, at = False, at + 2
            continue
        if marker < 0xC0 or marker == 0xD8:
            raise ValueError("broken header: a JPEG marker where none belongs")
        (length,) = struct.unpack_from(">H", data, at + 2)
        if length < 2:  # libjpeg skips nothing
            plain, length = False, 2
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
    return Header("JPEG", width, height, plain)


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
    return Header("PNG", width, height, plain=False)
