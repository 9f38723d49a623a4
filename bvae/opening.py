"""The one way to open a file that a user names, or that lies in a folder of theirs.

It is a regular file of at most so many bytes. A pipe would block for ever, and a device or a sparse file
would fill the memory.
"""

import os
import stat
from typing import BinaryIO

from bvae.errors import UsageError

# Most bytes of a file of each kind. A longer one is something else.
CONFIG = 1 << 18  # YAML, which takes seconds to read
TABLE = 1 << 28  # lists, CSV and JSON: CelebA's longest list has 27 MB
IMAGE = LOG = 1 << 30
WEIGHTS = 1 << 33  # models and checkpoints
ARCHIVE = 1 << 40  # tar files and npz, of which parts alone are read


class NotRead(UsageError):
    """A file that is not opened. Its message names the file, `strerror` alone does not."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.strerror = reason


def open_regular(path: str | os.PathLike[str], most: int, buffering: int = -1) -> BinaryIO:
    """Open a regular file of at most `most` bytes for reading; links to one are followed.

    Args:
        buffering: as for `open`; 0 is faster where all is read at once.

    Raises:
        NotRead: a folder, a pipe or a device, or more bytes.
        OSError: it cannot be opened.
    """
    file = open(path, "rb", buffering, opener=_open_nonblocking)  # noqa: SIM115 (the caller closes it)
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise NotRead(path, "not a regular file")
        if status.st_size > most:
            raise NotRead(path, f"{status.st_size:,} bytes are more than {most:,}: not read")
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """A whole regular file of at most `most` bytes. Raises NotRead, OSError."""
    with open_regular(path, most) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return file.read(size)
        except MemoryError:
            raise NotRead(path, f"its {size:,} bytes do not fit into memory") from None


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """A whole file of UTF-8 text, with or without a byte order mark. Raises as `read_bytes`; UnicodeError."""
    return read_bytes(path, most).decode("utf-8-sig")


def _open_nonblocking(path: str, flags: int) -> int:
    """Opening a pipe without a writer would block."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
