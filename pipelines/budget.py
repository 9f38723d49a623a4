"""A bound on the memory that all threads together take for the images that they read and decode."""

import contextlib
import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

LEAST = 1 << 30  # bytes: one large image must fit
SMALL = 1 << 20  # bytes: fewer are not counted, because a thread holds one image only
LARGE = 1 << 26  # bytes: who gave back as many returns them to the system
SHARE = 8  # a budget is this part of the memory
GROUP = Path("/sys/fs/cgroup/memory.max")  # the limit of a container


class Budget:
    """Bytes that threads take and give back; who finds too few waits.

    An image that needs more than there is takes all, and is alone then.
    """

    def __init__(self, total: int) -> None:
        self.total, self._taken = total, 0
        self._given_back = threading.Condition()

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Hold so many bytes inside the block."""
        if size < SMALL:
            yield
            return
        size = min(size, self.total)
        with self._given_back:
            self._given_back.wait_for(lambda: self._taken + size <= self.total)
            self._taken += size
        try:
            yield
        finally:
            if size >= LARGE:
                _return_freed()
            with self._given_back:
                self._taken -= size
                self._given_back.notify_all()


def _return_freed() -> None:
    """Return freed memory to the system: glibc would keep it for the thread that freed it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def memory() -> int:
    """Bytes of memory that this process may use, as far as the system says."""
    sizes = [SHARE * LEAST]
    if hasattr(os, "sysconf"):
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # no such limit
        sizes.append(int(GROUP.read_text()))
    return min(sizes)


# Two, because a thread that holds a file must not wait for one that waits to read another.
READING, DECODING = (Budget(max(LEAST, memory() // SHARE)) for _ in range(2))
