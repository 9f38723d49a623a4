"""Keep freed memory: glibc gives a large tensor back to the system, and maps it again in the next step."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# Parameters of mallopt(3), from glibc's malloc.h, and the values that glibc starts with.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
TRIM_THRESHOLD, MMAP_MAX = 128 * 1024, 65536
NEVER = 2**31 - 1  # bytes

_open = 0  # blocks of `kept` in this process


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Inside the block, freed memory is not returned to the system. Blocks may be nested.

    glibc maps every block of over 32 MB for itself and unmaps it when it is freed: a training step on a CPU
    then takes tens of thousands of page faults. Other C libraries are left as they are.
    """
    global _open
    _open += 1
    if _open == 1:
        keep(True)
    try:
        yield
    finally:
        _open -= 1
        if _open == 0:
            keep(False)


def keep(whether: bool) -> None:
    """Keep freed memory from now on, or return it to the system as glibc does."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0 if whether else MMAP_MAX)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER if whether else TRIM_THRESHOLD)
    if not whether:
        libc.malloc_trim(0)
