"""One owner at a time: a lock that the system releases when its process ends, however it ends."""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from bvae import files
from bvae.errors import UNSUPPORTED, UsageError, say_once
from bvae.opening import NotRead

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
NAMED = 200  # bytes of a lock file that are read: the owner's name


@contextlib.contextmanager
def own(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder: the file `.lock` in it.

    Raises:
        UsageError: another process holds it.
        OSError: the file cannot be written.
    """

    def refuse(owner: str) -> None:
        raise UsageError(
            f"{folder} is in use by {owner}: wait for its end, or name another folder with --out"
        )

    with lock(folder / LOCK, refuse):
        yield


@contextlib.contextmanager
def wait(path: Path, label: str) -> Iterator[None]:
    """Hold a lock file; if another process holds it, say so with `label`, and wait. Raises OSError."""
    with lock(path, lambda owner: print(f"{label}: waiting for {owner}, which prepares them", flush=True)):
        yield


@contextlib.contextmanager
def lock(path: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file, which names its owner, and is removed at the end.

    A file that another user's killed process left does not hinder, nor is a link followed. On a file system
    without locks, a line on stderr says so, once.

    Args:
        busy: called with the owner if another process holds the lock. It raises, or the lock is waited for.

    Raises:
        OSError: the file cannot be written.
    """
    if not fcntl:
        yield
        return
    while True:
        handle = _open(path)
        try:
            _take(handle, path, busy)
            if not _is_named(handle, path):
                continue  # its last owner has removed it meanwhile
            with contextlib.suppress(OSError):  # a full disk, or another user's file
                os.fchmod(handle, 0o644)  # if this process is killed, every user can take it
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            try:
                yield
            finally:
                with contextlib.suppress(FileNotFoundError, PermissionError):  # of another user
                    path.unlink()
            return
        finally:
            os.close(handle)


def _open(path: Path) -> int:
    """Open a lock file. One of another user can be locked too, if it can be read."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        handle = os.open(path, flags | os.O_RDONLY)
    except OSError:
        if not path.is_symlink():
            raise
        raise NotRead(path, "a link, not a lock: remove it") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotRead(path, "not a regular file, and no lock: remove it")
    return handle


def _take(handle: int, path: Path, busy: Callable[[str], None]) -> None:
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            name = os.pread(handle, NAMED, 0).decode(errors="replace").strip()
            busy(files.one_line(name) or "another process")
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EBADF):  # NFS locks no file that is open for reading
            raise files.named(error, path) from None
        say_once(f"{path.parent}: no locks on this file system: start no second process that writes there")


def _is_named(handle: int, path: Path) -> bool:
    """Whether an open file still has that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
