"""Write files atomically: complete and on the disk, or not at all."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bvae import disk
from bvae.errors import FULL, UNSUPPORTED, say_once

if TYPE_CHECKING:
    from PIL.Image import Image

UNFINISHED = ".tmp"  # suffix of a file while it is written


def write(path: Path, writer: Callable[[IO[bytes]], Any], size: int) -> None:
    """Write a file under a temporary name, and rename it when its bytes are on the disk.

    After a crash or with a full disk, the old file is unchanged.

    Args:
        writer: writes into the open file.
        size: bytes that it needs, for the message of a full disk.

    Raises:
        OSError: it cannot be written; for a full disk the message says how many bytes are needed and free.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, "wb") as file:
            writer(file)
            file.flush()
            _sync(file.fileno(), path)
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        # torch.save raises a RuntimeError in place of ENOSPC
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError) and cause.errno in FULL:
            text = f"{cause.strerror}: {path.name} needs {size:,} bytes, and {disk.free(path.parent)}"
            raise OSError(cause.errno, text, str(path.parent)) from None
        if isinstance(cause, OSError):
            raise named(cause, path) from None
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """`write` of bytes. Raises OSError."""
    write(path, lambda file: file.write(data), len(data))


def write_text(path: Path, text: str) -> None:
    """`write` of text as UTF-8. Raises OSError."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_image(path: Path, image: "Image", **options: Any) -> None:
    """`write` of a Pillow image, in the format of the name's suffix. Raises OSError."""
    buffer = io.BytesIO()
    image.save(buffer, format=path.suffix[1:].upper(), **options)
    write_bytes(path, buffer.getvalue())


def one_line(name: str) -> str:
    """A file's name for a list of one name per line.

    >>> one_line("a\\nb.png")
    'a\\\\nb.png'
    """
    return name.replace("\n", "\\n").replace("\r", "\\r")


def sync_folder(folder: Path) -> None:
    """Write a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _sync(handle, folder)
    finally:
        os.close(handle)


def _sync(handle: int, path: Path) -> None:
    """fsync, where the file system has it; elsewhere a line on stderr says so, once."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        say_once(f"{path}: this file system cannot sync it: a crash of the machine may lose the last files")


def named(error: OSError, path: Path) -> OSError:
    """The error with the path; one of an open file's handle has none."""
    return error if error.filename else OSError(error.errno, error.strerror, str(path))
