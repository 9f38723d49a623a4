"""Image files for tests: good ones, odd ones and damaged ones, in folders of several layouts."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SPLIT_OF = [0] * 8 + [1] * 2 + [2] * 2  # of the twelve images of `write_celeba`


def smooth(size=(178, 218), seed=0):
    """A smooth random picture of width x height, so that JPEG keeps it and resizing shows differences."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.BICUBIC)


def write_image(path, size=(178, 218), seed=0, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    smooth(size, seed).convert(mode).save(path, **{"quality": 95, **options})
    return str(path)


def write_celeba(root, layout="torchvision"):
    """CelebA in torchvision's, Kaggle's or a flat layout."""
    base = root / "celeba" if layout == "torchvision" else root
    images = base / "img_align_celeba" / ("img_align_celeba" if layout == "kaggle" else ".")
    names = [f"{i + 1:06}.jpg" for i in range(len(SPLIT_OF))]
    for i, name in enumerate(names):
        write_image(images / name, seed=i)
    if layout == "kaggle":
        lines = ["image_id,partition", *(f"{n},{s}" for n, s in zip(names, SPLIT_OF, strict=True))]
        (base / "list_eval_partition.csv").write_text("\n".join(lines) + "\n")
    else:
        lines = [f"{n} {s}" for n, s in zip(names, SPLIT_OF, strict=True)]
        (base / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return root


def write_folder(root: Path, n: int, size=(40, 40)) -> Path:
    """n JPEGs 000.jpg, 001.jpg, ... of different pictures."""
    for i in range(n):
        write_image(root / f"{i:03}.jpg", size, seed=i)
    return root


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, bits, colour, rows=b""):
    """A PNG file of any header, written by hand."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def flip_bit(data, place, bit=0):
    """The data with one bit of the byte at `place` turned over."""
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def damaged():
    """Name: (the file's bytes, what is said of it)."""
    good = encoded(smooth(), "JPEG", quality=90)
    tables = good.index(b"\xff\xc4")  # the Huffman tables
    page = b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"
    drawn = encoded(smooth(), "PNG")
    return {
        "empty": (b"", "empty"),
        "truncated": (good[: len(good) // 2], "truncated: the end of the JPEG is missing"),
        "cut in its header": (good[:300], "truncated in its header"),
        "quota page": (page, "a web page instead of an image: a download that failed"),
        "zip": (b"PK\x03\x04" + bytes(100), "a zip archive instead of an image: unpack it"),
        "text": (b"not an image", "no image: neither JPEG, PNG, WEBP, BMP, GIF, TIFF nor AVIF"),
        "marker flipped": (flip_bit(good, 20), "Quantization table 0x00 was not defined"),
        "table flipped": (flip_bit(good, tables + 6, 6), "Bogus Huffman table definition"),
        "PNG truncated": (drawn[: len(drawn) // 2], "truncated: the end of the PNG is missing"),
        "PNG flipped": (flip_bit(drawn, len(drawn) // 2), "broken PNG: "),
        "bomb": (png(30_000, 30_000, 8, 2), "30000 x 30000 pixels are more than 80,000,000: not decoded"),
        "too small": (
            encoded(smooth((100, 120)), "JPEG"),
            "100 x 120 pixels are smaller than the crop of 148",
        ),
    }
