"""Memory that is freed and used again costs no page faults while it is kept, and is given back afterwards."""

import platform
import resource

import pytest
import torch

from bvae.training import malloc

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")

SIZE = 64 << 20  # bytes: glibc maps a block of that size for itself
PAGES = SIZE // resource.getpagesize()


def faults() -> int:
    """Of writing to a large new tensor."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(SIZE, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Pages of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


def test_a_kept_block_is_used_again():
    huge = faults() < PAGES // 8  # the system maps pages of 2 MB
    with malloc.kept():
        faults()
        assert faults() < PAGES // 100
        held = resident()
    assert resident() < held - PAGES // 2
    if not huge:
        assert faults() > PAGES // 2


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda *_: pytest.fail("called"))
    with malloc.kept():
        pass
