"""One owner per folder: a lock that the system releases when its process ends, however it ends."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from bvae.errors import UNSUPPORTED, UsageError, say_once

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextlib.contextmanager
def own(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder. The file `.lock` in it names the owner, and is removed at the end.

    On a file system without locks, a line on stderr says so, once.

    Raises:
        UsageError: another process holds it.
        OSError: the file cannot be written.
    """
    path = folder / LOCK
    if not fcntl:
        yield
        return
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise UsageError(
                    f"{folder} is in use by {owner}: wait for its end, or name another folder with --out"
                ) from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                say_once(f"{folder}: no locks on this file system: start no second run in the same folder")
            try:
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    continue  # its last owner has removed it meanwhile
            except FileNotFoundError:
                continue
            file.truncate(0)
            with contextlib.suppress(OSError):  # a full disk: the run says so when it needs more than a name
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
