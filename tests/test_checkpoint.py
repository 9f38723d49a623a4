"""Checkpoints: complete or not there, verified, without pickle, and the right ones kept."""

import errno
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch

from bvae import files
from bvae.training import checkpoint

CPU = torch.device("cpu")


def state(step):
    generator = torch.Generator().manual_seed(step)
    return {"model": {"weight": torch.randn(50, 20, generator=generator)}, "step": step, "config": "a: 1"}


def write(folder, *steps):
    return [checkpoint.save(folder, step, state(step)) for step in steps]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_holds(folder, step):
    found = checkpoint.load_newest(folder, CPU)
    assert found["step"] == step
    assert torch.equal(found["model"]["weight"], state(step)["model"]["weight"])


def test_what_is_read_is_what_was_written(tmp_path):
    write(tmp_path, 3, 12)
    assert_holds(tmp_path, 12)
    versions = checkpoint.load_newest(tmp_path, CPU)["versions"]
    assert versions["torch"] == torch.__version__
    assert set(versions) >= {"torch", "bvae"}


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    for step, score in [(1, -9.0), (2, -5.0), (3, None), (4, -7.0), (5, float("nan")), (6, -6.0)]:
        write(tmp_path, step)
        if score is not None:
            checkpoint.mark_best(tmp_path, step, score)
    assert names(tmp_path) == ["best.json", "step-00000002.pt", "step-00000005.pt", "step-00000006.pt"]
    write(tmp_path, 7)
    checkpoint.mark_best(tmp_path, 7, -4.0)
    checkpoint.save(tmp_path, 8, state(8))
    assert names(tmp_path) == ["best.json", "step-00000007.pt", "step-00000008.pt"]
    assert_holds(tmp_path, 8)


DAMAGED_RECORDS = [
    *("", "{", "[]", "[" * 10_000, '{"step": "x", "score": 1}', '{"step": 5, "score": 1e9}'),
    *('{"step": 1, "score": NaN}', '{"step": 1, "score": 1e999}', '{"step": 1e999, "score": 1}'),
]


@pytest.mark.parametrize("text", DAMAGED_RECORDS, ids=range(len(DAMAGED_RECORDS)))
def test_record_of_the_best_that_is_damaged(tmp_path, text):
    write(tmp_path, 1)
    (tmp_path / "best.json").write_text(text)
    write(tmp_path, 2)
    checkpoint.mark_best(tmp_path, 2, -1.0)
    write(tmp_path, 3, 4)
    assert names(tmp_path) == ["best.json", "step-00000002.pt", "step-00000003.pt", "step-00000004.pt"]


def test_steps_of_nine_digits_come_after_those_of_eight(tmp_path):
    write(tmp_path, 99_999_998, 99_999_999, 100_000_000)
    assert_holds(tmp_path, 100_000_000)
    assert len(names(tmp_path)) == 2


# ---- damaged files -----------------------------------------------------------------------------------------

DAMAGE = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "last byte missing": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "another file": lambda data: b"<!DOCTYPE html>" * 100,
    "bit flipped in the weights": lambda data: flip(data, len(data) // 2),
    "bit flipped in the pickle": lambda data: flip(data, data.index(b"weight")),
}


def flip(data, place, bit=0):
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_falls_back(tmp_path, capsys, damage):
    before, newest = write(tmp_path, 1, 2)
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    assert_holds(tmp_path, 1)
    assert f"{newest} is damaged (" in capsys.readouterr().err
    assert_holds(tmp_path, 1)
    assert capsys.readouterr().err == ""  # it is set aside, so that it is not met again
    assert newest.with_suffix(".damaged").exists()
    write(tmp_path, 2)
    assert before.exists()
    assert_holds(tmp_path, 2)


def test_no_bit_flips_unseen(tmp_path):
    """In all of the file: either it is refused, or the state is the one that was written."""
    (path,) = write(tmp_path, 1)
    good = path.read_bytes()
    refused = 0
    for place in range(0, len(good), 7):
        path.write_bytes(flip(good, place, place % 8))
        try:
            found = checkpoint._load(path, CPU)
        except checkpoint.Damaged:
            refused += 1
            continue
        assert torch.equal(found["model"]["weight"], state(1)["model"]["weight"]), place
        assert (found["step"], found["config"]) == (1, "a: 1")
    assert refused > 0.8 * len(good) / 7


def test_all_damaged(tmp_path):
    for path in write(tmp_path, 1, 2):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no checkpoint that is not damaged: start the run again"):
        checkpoint.load_newest(tmp_path, CPU)


def test_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint: the run stopped before its first one"):
        checkpoint.load_newest(tmp_path, CPU)


def test_checkpoint_under_another_steps_name(tmp_path):
    (path,) = write(tmp_path, 1)
    path.rename(tmp_path / "step-00000002.pt")
    with pytest.raises(ValueError, match="start the run again"):
        checkpoint.load_newest(tmp_path, CPU)


# ---- hostile files -----------------------------------------------------------------------------------------


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_not_run(tmp_path, capsys, zipped):
    folder, victim = tmp_path / "checkpoints", tmp_path / "made"
    _, newest = write(folder, 1, 2)
    torch.save({**state(2), "extra": Hostile(victim)}, newest, _use_new_zipfile_serialization=zipped)
    assert_holds(folder, 1)
    assert not victim.exists()
    assert f"{newest} is damaged" in capsys.readouterr().err
    torch.load(newest.with_suffix(".damaged"), weights_only=False)
    assert victim.exists()  # the file was a hostile one indeed


def repacked(path, compression=zipfile.ZIP_STORED, **changes):
    """A checkpoint with some records replaced, its checksums right."""
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", compression) as target:
        for entry in source.infolist():
            name = entry.filename.split("/", 1)[1]
            target.writestr(entry.filename, changes.get(name, source.read(entry)))


def test_compressed_bomb_is_not_unpacked(tmp_path):
    (path,) = write(tmp_path, 1)
    repacked(path, zipfile.ZIP_DEFLATED, **{"data/0": bytes(1 << 28)})
    assert path.stat().st_size < 1 << 20
    with pytest.raises(checkpoint.Damaged, match=r"torch.save did not write it"):
        checkpoint._load(path, CPU)


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "byteorder", "version"])
def test_wrong_record_with_a_right_checksum(tmp_path, record):
    (path,) = write(tmp_path, 1)
    repacked(path, **{record: b"\x80\x02."})
    with pytest.raises(checkpoint.Damaged):
        checkpoint._load(path, CPU)


# ---- writes that fail --------------------------------------------------------------------------------------


class Filling(io.FileIO):
    """A file on a disk that is full at the n-th write."""

    left = 0

    def write(self, data):
        if Filling.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        Filling.left -= 1
        return super().write(data)


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr(files, "open", Filling, raising=False)


def test_disk_full_at_every_write(tmp_path, full_disk):
    Filling.left = 1000
    write(tmp_path, 1, 2)
    Filling.left = 1000
    checkpoint.save(tmp_path / "whole", 3, state(3))
    writes = 1000 - Filling.left
    assert writes > 5
    for Filling.left in range(writes):
        with pytest.raises(
            OSError, match=r"step-00000003.pt needs 4,000 bytes, and [\d,]+ bytes are free"
        ) as failed:
            checkpoint.save(tmp_path, 3, state(3))
        assert failed.value.errno == errno.ENOSPC
        assert_holds(tmp_path, 2)
    Filling.left = writes
    checkpoint.save(tmp_path, 3, state(3))
    with pytest.raises(OSError, match=r"best.json needs \d+ bytes"):
        checkpoint.mark_best(tmp_path, 3, -1.0)
    assert_holds(tmp_path, 3)
    assert "best.json" not in names(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_other_calls_that_fail(tmp_path, monkeypatch, call, number):
    write(tmp_path, 1, 2)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=os.strerror(number)) as failed:
        checkpoint.save(tmp_path, 3, state(3))
    assert failed.value.errno == number
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]
    assert_holds(tmp_path, 2)


def test_name_comes_after_the_bytes_and_is_on_the_disk_too(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: calls.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    write(tmp_path, 1)
    written, *rest = calls
    assert Path(written).match("step-00000001.pt.*.tmp")
    assert rest == ["replace", str(tmp_path)]


def test_what_a_killed_process_left(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-00000002.pt.tmp").write_bytes(b"half")
    assert_holds(tmp_path, 1)
    write(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001.pt", "step-00000003.pt"]
