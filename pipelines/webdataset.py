"""Image files, on their own or as members of WebDataset's tar shards."""

import os
import tarfile
from pathlib import Path
from typing import NamedTuple


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
    """The whole file. Raises OSError, or ValueError for a shard that ends too early."""
    if isinstance(file, str):
        with open(file, "rb", buffering=0) as whole:
            return whole.read()
    with open(file.shard, "rb") as shard:
        data = os.pread(shard.fileno(), file.size, file.offset)
    if len(data) < file.size:
        raise ValueError("its shard is truncated")
    return data


def members(shard: str | Path, suffixes: tuple[str, ...]) -> list[Member]:
    """The shard's regular files with one of the suffixes, in its order; reads the tar headers alone.

    Raises:
        ValueError: not an uncompressed tar file, or one that ends too early.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            found = [
                Member(str(shard), entry.name, entry.offset_data, entry.size)
                for entry in tar
                if entry.isfile() and entry.name.lower().endswith(suffixes)
            ]
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is not a tar file that can be read ({error}): fetch it again") from None
    return found
