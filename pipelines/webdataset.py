"""Image files, on their own or as members of WebDataset's tar shards."""

import contextlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bvae.errors import UsageError
from bvae.opening import ARCHIVE, IMAGE, NotRead, open_regular
from bvae.pipelines.budget import READING
from bvae.pipelines.passed_over import SUFFIXES, PassedOver, suffix

COMPRESSIONS = {  # by the first bytes
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class Member(NamedTuple):
    """An image inside an uncompressed tar file."""

    shard: str
    name: str
    offset: int  # bytes
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


ImageFile = str | Member  # a path, or a part of a shard


def read(file: ImageFile) -> bytes:
    """The whole file.

    Raises:
        OSError: it cannot be read.
        UsageError: it is a pipe or a device, or too long for an image, or its shard is truncated.
    """
    with hold(file) as data:
        return data


@contextlib.contextmanager
def hold(file: ImageFile) -> Iterator[bytes]:
    """The whole file, as `read`, inside the block; waits while other threads hold too many bytes."""
    path, most = (file, IMAGE) if isinstance(file, str) else (file.shard, ARCHIVE)
    with open_regular(path, most, buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        if isinstance(file, Member):
            if (size := file.size) > IMAGE:
                raise NotRead(path, f"{size:,} bytes are more than {IMAGE:,}: not read")
            opened.seek(file.offset)
        with READING.take(size):
            data = opened.read(size)
            if isinstance(file, Member) and len(data) < size:
                raise NotRead(path, "its shard is truncated")
            yield data


def _compression(shard: str | Path) -> str | None:
    """The name of the compression that a file's first bytes tell."""
    with open_regular(shard, ARCHIVE) as file:
        start = file.read(6)
    return next((kind for magic, kind in COMPRESSIONS.items() if start.startswith(magic)), None)


def members(shard: str | Path, passed: PassedOver) -> list[Member]:
    """The shard's image files, in the shard's order; reads only the tar headers.

    Args:
        passed: counts the other members.

    Raises:
        OSError: it cannot be read.
        UsageError: not an uncompressed tar file, one that ends too early, or a name that points outside it.
    """
    found: list[Member] = []
    try:
        with open_regular(shard, ARCHIVE) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            last = -1
            for entry in tar:
                if entry.size < 0 or entry.offset <= last:  # tarfile would loop for ever
                    raise tarfile.ReadError("a negative size")
                last = entry.offset
                name = os.path.basename(entry.name)
                if entry.isdir():
                    continue
                if not entry.isreg() or entry.issparse():
                    passed.files["links or sparse files in tar files"] += 1
                    continue
                parts = entry.name.split("/")
                if any(part.startswith(".") for part in parts if part not in (".", "..")):
                    passed.files["hidden"] += 1  # macOS adds ._x.jpg to x.jpg
                    continue
                if suffix(name) not in SUFFIXES:
                    passed.add(name)
                    continue
                if entry.name.startswith("/") or ".." in parts:
                    raise tarfile.ReadError(f"{entry.name!r} points outside the shard's folder")
                found.append(Member(str(shard), entry.name, entry.offset_data, entry.size))
    except NotRead:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        if kind := _compression(shard):
            raise UsageError(f"{shard} is compressed ({kind}), not a plain tar file: unpack it") from None
        raise UsageError(f"{shard} is not a tar file that can be read ({error}): fetch it again") from None
    return found
