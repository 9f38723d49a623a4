"""The disk cache: the same pixels whenever it is opened, and never a stale, half-written or damaged one."""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import zlib
from dataclasses import replace

import pytest
import torch
from pictures import flip_bit, write_folder, write_image

from bvae.pipelines import cache, decoder, torch_decode
from bvae.pipelines.cache_folder import default_folder
from bvae.pipelines.picture import Picture

CPU = torch.device("cpu")
PICTURE = Picture(None, 32, 3)
FORK = multiprocessing.get_context("fork")  # spawning would import torch again


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "images", 20)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def request(root, picture=PICTURE, name="torchvision"):
    return cache.Request(root, sorted(str(path) for path in root.iterdir()), picture, name)


def open_or_build(root, folder, rank=0, world_size=1):
    def make():
        return decoder.build("torchvision", PICTURE, CPU)

    return cache.open_or_build(request(root), folder, make, "images", rank, world_size)


def decoded(root):
    ((images, _),) = decoder.build("torchvision", PICTURE, CPU).decode([request(root).files])
    return images


class Elsewhere:
    """A process that builds the cache, taking so many seconds an image and core."""

    def __init__(self, root, folder, seconds=0.0, rank=0, world_size=1):
        self.log = folder.parent / f"log {time.monotonic_ns()}"
        self.process = FORK.Process(target=self._build, args=(root, folder, seconds, rank, world_size))
        self.process.start()

    def _build(self, root, folder, seconds, rank, world_size):
        decode = torch_decode.decode_bytes

        def slowly(*arguments):
            time.sleep(seconds)
            return decode(*arguments)

        torch_decode.decode_bytes = slowly
        with open(self.log, "w", buffering=1) as log, contextlib.redirect_stdout(log):
            images = open_or_build(root, folder, rank=rank, world_size=world_size).images
            print(zlib.crc32(images.numpy().tobytes()))

    def printed(self):
        self.process.join(30)
        assert self.process.exitcode == 0
        return self.log.read_text()


def wait_for(found):
    for _ in range(600):
        if found():
            return
        time.sleep(0.01)
    raise TimeoutError


def test_decodes_once(root, folder, capsys, monkeypatch):
    first = open_or_build(root, folder)
    assert "images: decoding 20 with torchvision" in capsys.readouterr().out
    assert torch.equal(first.images, decoded(root))
    monkeypatch.setattr(decoder, "build", None)  # nothing to decode with
    second = open_or_build(root, folder)
    assert f"images: 20 from the cache {first.folder}" in capsys.readouterr().out
    assert torch.equal(second.images, first.images)
    assert second.bad == []
    assert [path.name for path in folder.iterdir()] == [first.folder.name]
    assert {path.name for path in first.folder.iterdir()} == {"files.txt", "images.bin", "manifest.json"}


def test_the_manifest_says_what_the_cache_holds(root, folder):
    entry = open_or_build(root, folder).folder
    manifest = json.loads((entry / "manifest.json").read_text())
    assert manifest["root"] == str(root)
    assert (manifest["count"], manifest["crop"], manifest["size"], manifest["channels"]) == (20, None, 32, 3)
    assert manifest["decoder"] == "torchvision"
    place, *files = (entry / "files.txt").read_text().splitlines()
    assert place == str(root)
    assert [line.split("\t")[0] for line in files] == [path.name for path in sorted(root.iterdir())]


@pytest.mark.parametrize(
    "change", ["content", "touched", "added", "removed", "size", "crop", "channels", "decoder", "moved"]
)
def test_a_change_is_another_cache(root, folder, change):
    before = request(root).key
    picture, name = PICTURE, "torchvision"
    if change == "content":
        write_image(root / "003.jpg", (40, 40), seed=99)
    elif change == "touched":
        os.utime(root / "003.jpg", (1, 1))
    elif change == "added":
        write_image(root / "0031.jpg", (40, 40))
    elif change == "removed":
        (root / "003.jpg").unlink()
    elif change == "moved":
        root = root.rename(root.with_name("elsewhere"))
    elif change == "decoder":
        name = "dali"
    else:
        picture = replace(PICTURE, **{change: {"size": 33, "crop": 32, "channels": 1}[change]})
    assert request(root, picture, name).key != before


def test_bad_files_are_left_out_and_remembered(root, folder):
    (root / "004.jpg").write_bytes(b"")
    for _ in range(2):
        found = open_or_build(root, folder)
        assert found.bad == [(str(root / "004.jpg"), "empty")]
        assert len(found.images) == 19
    good = decoded(root)[[i for i in range(20) if i != 4]]
    assert torch.equal(found.images, good)


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "longer",
        "flipped",
        "images missing",
        "manifest flipped",
        "manifest truncated",
        "manifest missing",
        "manifest of another kind",
    ],
)
def test_damage_is_named_and_mended(root, folder, damage, capsys):
    entry = open_or_build(root, folder).folder
    images, manifest = entry / "images.bin", entry / "manifest.json"
    said = "manifest.json is not what was written"
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:-1])
        said = f"images.bin holds {20 * 32 * 32 * 3 - 1} bytes instead of {20 * 32 * 32 * 3}"
    elif damage == "longer":
        images.write_bytes(images.read_bytes() + b"\0")
        said = "images.bin holds"
    elif damage == "flipped":
        images.write_bytes(flip_bit(images.read_bytes(), 12345, 3))
        said = "the checksum of images.bin is not the one that was written"
    elif damage == "images missing":
        images.unlink()
        said = "images.bin is missing"
    elif damage == "manifest flipped":
        manifest.write_text(manifest.read_text().replace('"count": 20', '"count": 10'))
    elif damage == "manifest truncated":
        manifest.write_bytes(manifest.read_bytes()[:50])
    elif damage == "manifest missing":
        manifest.unlink()
        said = "manifest.json is missing"
    else:
        manifest.write_text("[]")
    capsys.readouterr()
    found = open_or_build(root, folder)
    printed = capsys.readouterr().out
    assert f"{entry} is damaged ({said}" in printed
    assert "decoding again" in printed
    assert torch.equal(found.images, decoded(root))
    assert torch.equal(cache.read(entry).images, found.images)


@pytest.mark.parametrize("moment", ["images.bin", "files.txt", "manifest.json"])
def test_killed_at_any_moment_nothing_half_is_used(root, folder, moment, monkeypatch):
    """The next process starts anew, and clears away what is left."""
    sync = cache._sync

    def stop(file):
        sync(file)
        if file.name.endswith(moment):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(cache, "_sync", stop)
    builder = Elsewhere(root, folder)
    builder.process.join(30)
    assert builder.process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in sorted(folder.iterdir())] == [".lock", ".unfinished"]
    monkeypatch.undo()
    printed = Elsewhere(root, folder).printed()
    assert "decoding 20 with" in printed
    assert "waiting" not in printed
    assert [path.suffix for path in folder.iterdir()] == [""]


def test_of_two_processes_one_builds_and_the_other_waits(root, folder):
    first = Elsewhere(root, folder, seconds=0.05)
    wait_for(lambda: list(folder.glob("*.unfinished")))
    second = Elsewhere(root, folder)
    one, two = first.printed(), second.printed()
    assert "decoding 20 with" in one
    assert "images: waiting for process " in two
    assert "decoding 20" not in two
    assert one.splitlines()[-1] == two.splitlines()[-1]  # the same bytes
    assert [path.suffix for path in folder.iterdir()] == [""]


def test_who_waits_for_a_killed_process_builds(root, folder):
    first = Elsewhere(root, folder, seconds=5)
    wait_for(lambda: list(folder.glob("*.unfinished")))
    second = Elsewhere(root, folder)
    wait_for(lambda: second.log.exists() and "waiting" in second.log.read_text())
    first.process.kill()
    assert "decoding 20 with" in second.printed()
    assert [path.suffix for path in folder.iterdir()] == [""]


def test_many_threads_leave_one_cache_and_no_lock(root, folder):
    """Locks are removed by who held them: those who waited for one must not both build."""
    results = []
    threads = [threading.Thread(target=lambda: results.append(open_or_build(root, folder))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(torch.equal(result.images, results[0].images) for result in results)
    assert [path.suffix for path in folder.iterdir()] == [""]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_decode_their_shares(root, folder, world_size):
    ranks = [Elsewhere(root, folder, 0.1, rank, world_size) for rank in range(world_size)]
    printed = [rank.printed() for rank in ranks]
    for rank, text in enumerate(printed):
        assert f"images, share {rank + 1} of {world_size}: decoding {20 // world_size} with" in text
    (entry,) = folder.iterdir()
    alone = Elsewhere(root, folder.with_name("alone")).printed()
    assert {text.splitlines()[-1] for text in printed} == {alone.splitlines()[-1]}  # the same bytes
    assert (folder.with_name("alone") / entry.name).is_dir()


def test_a_rank_that_never_comes_is_stood_in_for(root, folder):
    (root / "002.jpg").write_bytes(b"")
    found = open_or_build(root, folder, rank=1, world_size=4)
    assert found.bad == [(str(root / "002.jpg"), "empty")]
    assert torch.equal(found.images, decoded(root)[[i for i in range(20) if i != 2]])
    assert [path.name for path in folder.iterdir()] == [found.folder.name]


def test_too_little_room_is_said_before_any_work(root, folder, monkeypatch):
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        OSError, match="make room, choose another disk with --cache-dir, or .* --stream"
    ) as error:
        open_or_build(root, folder)
    assert error.value.errno == errno.ENOSPC
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("full", ["images.bin", "files.txt", "manifest.json"])
def test_a_disk_that_fills_up_leaves_nothing(root, folder, full, monkeypatch):
    original = cache._sync

    def sync(file):
        if file.name.endswith(full):
            with open("/dev/full", "w") as device:
                device.write("x")  # raises ENOSPC when it is closed
        original(file)

    monkeypatch.setattr(cache, "_sync", sync)
    with pytest.raises(OSError, match="No space left on device"):
        open_or_build(root, folder)
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    assert len(open_or_build(root, folder).images) == 20


def test_a_cache_of_an_older_format_is_left_alone(root, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache, "FORMAT", cache.FORMAT - 1)
        old = open_or_build(root, folder).folder
    (old / "images.bin").write_bytes(flip_bit((old / "images.bin").read_bytes(), 0))  # other pixels
    before = (old / "images.bin").read_bytes()
    new = open_or_build(root, folder)
    assert new.folder != old
    assert torch.equal(new.images, decoded(root))
    assert (old / "images.bin").read_bytes() == before


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "bvae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(default_folder()) == "/home/someone/.cache/bvae"


def test_a_cache_that_is_removed_stays_readable_where_it_is_open(root, folder):
    found = open_or_build(root, folder)
    expected = found.images.clone()
    cache.remove(found.folder)
    assert not found.folder.exists()
    assert torch.equal(found.images, expected)
