"""What glibc is told while a CPU trains, and that it is told the opposite afterwards."""

import platform

import pytest

from bvae.training import malloc


class Library:
    """Stands in for the C library, and writes down the calls."""

    def __init__(self):
        self.calls = []

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))

    def malloc_trim(self, pad):
        self.calls.append("trim")


@pytest.fixture
def library(monkeypatch):
    stand_in = Library()
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: stand_in)
    return stand_in


def test_freed_memory_is_kept_and_then_given_back(library, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    with malloc.kept():
        assert library.calls == [(-4, 0), (-1, 2**31 - 1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD in malloc.h
        library.calls.clear()
    assert library.calls == [(-4, 65536), (-1, 128 * 1024), "trim"]  # glibc's own values


def test_another_c_library_is_left_alone(library, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with malloc.kept():
        pass
    assert library.calls == []
