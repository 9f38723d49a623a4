"""What is said of a full disk: the numbers that matter, in bytes, or that the inodes have run out."""

import errno
import os
import shutil

import pytest

from bvae import disk, files
from bvae.pipelines import cache


@pytest.fixture
def no_inodes(monkeypatch):
    monkeypatch.setattr(
        os, "statvfs", lambda _: os.statvfs_result((1, 1, 9000, 5000, 5000, 10, 0, 0, 0, 255))
    )


def test_free_bytes(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_234_567))
    assert disk.free(tmp_path) == "1,234,567 bytes are free"


def test_inodes_have_run_out(tmp_path, no_inodes):
    assert disk.free(tmp_path) == "5,000 bytes but no inodes are free: delete some files"


def test_a_file_system_that_makes_inodes_as_needed(tmp_path, monkeypatch):
    """Btrfs says that it has none."""
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((1, 1, 9000, 5000, 5000, 0, 0, 0, 0, 255)))
    assert disk.free(tmp_path) == "5,000 bytes are free"


def test_a_file_that_gets_no_inode(tmp_path, no_inodes):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="x needs 10 bytes, and [0-9,]+ bytes but no inodes are free"):
        files.write(tmp_path / "x", fail, 10)


def test_little_room_is_said_in_bytes(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12_000))
    error = cache._full(errno.ENOSPC, 123_456, tmp_path)
    assert "the decoded images take 123,456 bytes, and 12,000 bytes are free: make room" in str(error)
