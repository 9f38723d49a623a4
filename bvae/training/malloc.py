"""Keep freed memory: glibc gives a large tensor back to the system, and maps it again in the next step."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# Parameters of mallopt(3), from glibc's malloc.h, and the values that glibc starts with.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
TRIM_THRESHOLD, MMAP_MAX = 128 * 1024, 65536
NEVER = 2**31 - 1  # bytes


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Inside the block, freed memory is not returned to the system.

    glibc maps every block of over 32 MB for itself and unmaps it when it is freed: a training step on a CPU
    then takes tens of thousands of page faults. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        libc.malloc_trim(0)
