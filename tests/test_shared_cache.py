"""Cache folders of several users and of killed processes: locks, modes, owners, and what is left behind."""

import contextlib
import errno
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
import time
import zlib

import pytest
import torch
from pictures import write_folder

from bvae.config import DataConfig
from bvae.data import main
from bvae.datasets import find_files
from bvae.errors import UsageError, say_once
from bvae.owner import lock, own, wait
from bvae.pipelines import cache, decoder, faces, sprites
from bvae.pipelines.cache_folder import default_folder
from bvae.pipelines.picture import Picture

PICTURE = Picture(None, 32, 3)
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs the rights of root")
OTHER = 12345  # another user
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def entry(tmp_path, folder):
    return build(tmp_path, folder).folder


@pytest.fixture
def small(monkeypatch):
    """Sprites that are drawn at once."""
    monkeypatch.setattr(sprites, "COUNT", 100)


def build(tmp_path, folder, picture=PICTURE):
    root = tmp_path / "images"
    if not root.exists():
        write_folder(root, 6)
    files = sorted(str(path) for path in root.iterdir())
    request = cache.Request(root, files, picture, "torchvision")
    make = lambda: decoder.build("torchvision", picture, torch.device("cpu"))  # noqa: E731
    return cache.open_or_build(request, folder, make, "images")


@contextlib.contextmanager
def held_elsewhere(path):
    """Another process holds a lock file; gives its number."""
    code = (
        "import sys; from pathlib import Path; from bvae.owner import wait\n"
        "with wait(Path(sys.argv[1]), ''): print('held', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()


# ---- data that are drawn -----------------------------------------------------------------------------------


def test_who_draws_the_same_faces_waits_for_the_other(tmp_path, monkeypatch, capsys):
    """The first process is held up before its images; the second one must not draw at the same time."""
    drawn, go_on, original = [], threading.Event(), faces._write_images

    def slowly(*arguments):
        drawn.append(threading.current_thread().name)
        assert go_on.wait(20)
        original(*arguments)

    monkeypatch.setattr(faces, "_write_images", slowly)
    results = {}

    def draw(name):
        try:
            results[name] = faces.write(tmp_path, n=12, progress=False)
        except UsageError as error:
            results[name] = str(error)

    threads = [threading.Thread(target=draw, args=(name,), name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    assert drawn == ["first"]
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert drawn == ["first"]
    assert results["first"] == tmp_path / "celeba"
    assert f"{tmp_path / 'celeba'} exists already" in results["second"]
    assert f"faces: waiting for process {os.getpid()} on " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["celeba"]


def test_training_uses_the_faces_that_it_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bvae.datasets.DRAWN", 12)
    exists, calls = type(tmp_path).exists, []

    def late(path):
        """Another process draws them right after this one has looked."""
        if path.name == "celeba" and not calls:
            calls.append(path)
            faces.write(path.parent, n=12, progress=False)
            return False
        return exists(path)

    monkeypatch.setattr(type(tmp_path), "exists", late)
    assert len(find_files(DataConfig()).train) == 10


def test_what_a_killed_drawing_left_is_cleared(tmp_path):
    (tmp_path / ".celeba-abc" / "celeba").mkdir(parents=True)
    faces.write(tmp_path, n=12, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["celeba"]


# ---- locks -------------------------------------------------------------------------------------------------


def test_a_cache_names_who_builds_it(tmp_path, folder, capsys):
    entry = build(tmp_path, folder).folder
    cache.remove(entry)
    with held_elsewhere(cache.lock_of(entry)) as process:
        threading.Timer(0.3, process.kill).start()
        build(tmp_path, folder)
        assert f"images: waiting for process {process.pid} on " in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == [entry.name]


@ROOT_ONLY
def test_a_stale_lock_of_another_user_does_not_hinder(tmp_path):
    """In a folder where everybody may write and only owners may delete, as /tmp."""
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chmod(shared, 0o1777)
    path = shared / "x.lock"
    path.write_text("process 1 on other\n")
    os.chmod(path, 0o644)
    for folder in (tmp_path, *tmp_path.parents):  # pytest's are ours alone
        if not folder.stat().st_mode & 0o001:
            os.chmod(folder, 0o755)

    def work():
        os.setuid(OTHER)
        with wait(path, "x"):
            os._exit(7)

    process = FORK.Process(target=work)
    process.start()
    process.join(20)
    assert process.exitcode == 7


def test_a_lock_that_cannot_be_written_is_taken(tmp_path, monkeypatch):
    """As above, for who is no root: opening it for writing is refused."""
    path, real = tmp_path / "x.lock", os.open
    path.write_text("process 1 on other\n")

    def refuse(name, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(name))
        return real(name, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with wait(path, "x"):
        assert path.read_text() == "process 1 on other\n"
        with pytest.raises(UsageError, match="in use by process 1 on other"), lock(path, refuse_by_name):
            pass


def test_every_user_can_take_what_a_killed_process_left(tmp_path):
    before = os.umask(0o077)
    try:
        with wait(tmp_path / "x.lock", "x"):
            assert stat.S_IMODE((tmp_path / "x.lock").stat().st_mode) == 0o644
    finally:
        os.umask(before)


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADF])
def test_an_error_of_a_lock_names_its_path(tmp_path, monkeypatch, capsys, number):
    """NFS locks no file that is open for reading only."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    say_once.cache_clear()
    if number == errno.EIO:
        with (
            pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/x.lock'"),
            wait(tmp_path / "x.lock", "x"),
        ):
            pass
    else:
        with wait(tmp_path / "x.lock", "x"):
            assert f"{tmp_path}: no locks on this file system" in capsys.readouterr().err


def refuse_by_name(owner):
    raise UsageError(f"in use by {owner}")


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "link to a device"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, kind):
    precious, path = tmp_path / "precious", tmp_path / ".lock"
    precious.write_text("all of it")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        targets = {"link": precious, "dangling link": tmp_path / "new", "link to a device": "/dev/zero"}
        path.symlink_to(targets[kind])
    with pytest.raises(UsageError, match=r"\.lock: (a link, not a lock|not a regular file)"), own(tmp_path):
        pass
    assert precious.read_text() == "all of it"
    assert not (tmp_path / "new").exists()


# ---- owners and modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_are_what_the_umask_allows(tmp_path, folder, umask, mode, small):
    before = os.umask(umask)
    try:
        entry = build(tmp_path, folder).folder
        sprites.all_sprites(folder)
        faces.write(tmp_path / "faces", n=12, progress=False)
    finally:
        os.umask(before)
    files = [*entry.iterdir(), folder / sprites.FILE, *(tmp_path / "faces" / "celeba").glob("*.*")]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}
    folders = [folder, entry, tmp_path / "faces" / "celeba"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o777 & ~umask}


@ROOT_ONLY
def test_what_another_user_wrote_is_verified_and_named(tmp_path, folder, entry, capsys, small, monkeypatch):
    sprites.all_sprites(folder)
    os.chown(entry, OTHER, -1)
    os.chown(folder / sprites.FILE, OTHER, -1)
    capsys.readouterr()
    build(tmp_path, folder)
    sprites.all_sprites(folder)
    said = f"which user {OTHER} wrote: all its bytes agree with their checksums"
    assert capsys.readouterr().out.splitlines() == [
        f"images: 6 from the cache {entry}, {said}",
        f"sprites: {folder / sprites.FILE}, {said}",
    ]


def test_an_entry_of_other_images_is_not_used(tmp_path, folder, entry, capsys):
    """Whole, but not what its name says: of another size."""
    other = build(tmp_path, folder, Picture(None, 16, 3)).folder
    cache.remove(entry)
    other.rename(entry)
    found = build(tmp_path, folder)
    assert found.images.shape == (6, 32, 32, 3)
    assert "is damaged (its images are [6, 16, 16, 3] instead of [6, 32, 32, 3])" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["{entry}", "{entry}.unfinished"])
def test_a_link_in_the_cache_is_replaced_not_followed(tmp_path, folder, entry, name):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("all of it")
    path = folder / name.format(entry=entry.name)
    cache.remove(entry)
    path.symlink_to(precious)
    assert len(build(tmp_path, folder).images) == 6
    assert [file.name for file in precious.iterdir()] == ["file"]
    assert not entry.is_symlink()


@ROOT_ONLY
def test_a_folder_of_another_user_under_tmp_is_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "~")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    say_once.cache_clear()
    mine = default_folder()
    assert (mine, stat.S_IMODE(mine.stat().st_mode)) == (tmp_path / f"bvae-{os.getuid()}", 0o700)
    os.chown(mine, OTHER, -1)
    capsys.readouterr()
    assert main(["ls"]) == 2
    assert f"error: {mine} is not a folder of yours: name one with --cache-dir\n" in capsys.readouterr().err
    mine.rmdir()
    mine.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is not a folder of yours"):
        default_folder()


# ---- ls and rm ---------------------------------------------------------------------------------------------


def test_all_that_killed_runs_left_is_listed_and_removed(tmp_path, folder, entry, capsys, small):
    sprites.all_sprites(folder)
    (folder / "0123456789abcdef0123.unfinished").mkdir()
    (folder / "0123456789abcdef0123.unfinished" / "images.bin").write_bytes(bytes(2_000_000))
    left = {"0123456789abcdef0123.lock", ".sprites-a1b2", "sprites-1.bin.0a1b2c3d.tmp", "sprites-1.bin.lock"}
    for name in left:
        (folder / name).write_bytes(bytes(1_000_000))
    (folder / "mine.txt").write_text("not ours to delete")
    capsys.readouterr()
    assert main(["ls", "--cache-dir", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in lines[:-1]}
    assert listed == left | {entry.name, sprites.FILE, "0123456789abcdef0123.unfinished"}
    assert lines[-1] == f"6.1 MB in {folder}"
    assert main(["rm", "--all", "--cache-dir", str(folder)]) == 0
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_what_is_being_built_is_not_removed(folder, entry, capsys):
    unfinished = folder / "0123456789abcdef0123.unfinished"
    unfinished.mkdir()
    with held_elsewhere(folder / "0123456789abcdef0123.lock") as process:
        capsys.readouterr()
        assert main(["rm", "--all", "--cache-dir", str(folder)]) == 1
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 2  # the folder, and its lock
        assert all(f" is in use by process {process.pid} on " in line for line in error)
    assert unfinished.is_dir()
    assert not entry.exists()


def test_the_sprites_file_is_whole_or_absent(folder, small, monkeypatch):
    first = sprites.all_sprites(folder)
    data = (folder / sprites.FILE).read_bytes()
    assert int.from_bytes(data[-4:], "little") == zlib.crc32(data[:-4])
    assert torch.equal(sprites.all_sprites(folder), first)
    (folder / sprites.FILE).unlink()
    os.mkfifo(folder / sprites.FILE)
    assert torch.equal(sprites.all_sprites(folder), first)
