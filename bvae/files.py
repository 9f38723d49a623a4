"""Write files atomically: complete and on the disk, or not at all.

A link in the place of a file is replaced, not followed. If two processes write the same file, the file of one
of them is there, whole.
"""

import contextlib
import io
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bvae import disk
from bvae.errors import FULL, UNSUPPORTED, say_once

if TYPE_CHECKING:
    from PIL.Image import Image

UNFINISHED = ".tmp"  # suffix of a file while it is written
ABANDONED = 3600  # seconds since the last write to an unfinished file, after which its process has ended


def write(path: Path, writer: Callable[[IO[bytes]], Any], size: int) -> None:
    """Write a file under a temporary name, and rename it when its bytes are on the disk.

    After a crash or with a full disk, the old file is unchanged. Who has it open reads on in the old one.

    Args:
        writer: writes into the open file.
        size: bytes that it needs, for the message of a full disk.

    Raises:
        OSError: it cannot be written; for a full disk the message says how many bytes are needed and free.
    """
    # A name of its own for each writer, and no file or link that has it already.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with open(unfinished, "xb") as file:
            writer(file)
            file.flush()
            _sync(file.fileno(), path)
        os.replace(unfinished, path)
        sync(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        # torch.save raises a RuntimeError in place of ENOSPC
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError) and cause.errno in FULL:
            text = f"{cause.strerror}: {path.name} needs {size:,} bytes, and {disk.free(path.parent)}"
            raise OSError(cause.errno, text, str(path.parent)) from None
        if isinstance(cause, OSError) and cause.errno is not None:  # it may name the unfinished file
            raise OSError(cause.errno, cause.strerror, str(path)) from None
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


def append_text(path: Path) -> IO[str]:
    """A file of UTF-8 text, opened to append to it; it is created if needed, and no link is followed.

    Raises OSError.
    """
    return open(path, "a", encoding="utf-8", opener=_open_no_link)


def remove(path: Path) -> None:
    """Remove a file, if there is one; it stays away after a crash. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        sync(path.parent)


def remove_abandoned(folder: Path) -> None:
    """Remove the unfinished files that killed processes left in a folder."""
    for unfinished in folder.glob(f"*{UNFINISHED}"):
        with contextlib.suppress(OSError):  # another process was faster, or may not
            if time.time() - unfinished.lstat().st_mtime > ABANDONED:
                unfinished.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and those that it is in, where they are missing; their names are on the disk.

    Raises OSError.
    """
    missing = [folder] if not folder.exists() else []
    while missing and not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def one_line(name: str) -> str:
    """A file's name for a list of one name per line.

    >>> one_line("a\\nb.png")
    'a\\\\nb.png'
    """
    return name.replace("\n", "\\n").replace("\r", "\\r")


def sync(path: Path) -> None:
    """Write to the disk a file's bytes, or a folder's list of names. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        _sync(handle, path)
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


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
