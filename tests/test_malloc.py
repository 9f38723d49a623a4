"""What glibc is told while a CPU trains, and that it is told the opposite afterwards."""

import platform

import pytest

from bvae.errors import UsageError
from bvae.evaluation import run_folder
from bvae.evaluation.options import Protocol
from bvae.model import BetaVAE
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


def test_only_the_outermost_block_gives_memory_back(library, monkeypatch):
    """A run inside a benchmark must not end what the benchmark asked for."""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    with malloc.kept():
        library.calls.clear()
        with malloc.kept():
            pass
        assert library.calls == []
    assert library.calls[-1] == "trim"


def test_evaluation_keeps_freed_memory(tmp_path, monkeypatch):
    model = BetaVAE(1, 2, image_size=64, arch="burgess")
    model.save_pretrained(tmp_path)
    calls = []

    def no_data(*_):
        calls.append("data")
        raise UsageError("no data")

    monkeypatch.setattr(malloc, "keep", calls.append)
    monkeypatch.setattr(run_folder, "open_truth", no_data)
    with pytest.raises(UsageError, match="no data"):
        run_folder.evaluate(tmp_path, Protocol(device="cpu"))
    assert calls == [True, "data", False]


def test_another_c_library_is_left_alone(library, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with malloc.kept():
        pass
    assert library.calls == []
