"""A power cut at any moment leaves results that are whole, and a run that resumes.

What survives is what was synced: by a record of the order of all syncs, and on ext4 by a copy of the blocks
that were written to its device.
"""

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import NETWORK

from bvae import files
from bvae.model import BetaVAE
from bvae.pipelines import faces
from bvae.train import main
from bvae.training import checkpoint, completion

TINY = [*NETWORK, "--no-compile", *("--log-every", "2", "--checkpoint-every", "4", "--max-steps", "10")]


class Disk:
    """Records what is synced below a folder, through Python, so that a cut after any sync can be replayed."""

    def __init__(self, root, monkeypatch):
        self.root, self.real = root, os.fsync
        self.log = []  # (inode, bytes or names) of each sync, and the whole tree at that moment
        self.held = []  # open files: their inodes are not used again
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, handle):
        self.real(handle)
        path, status = Path(os.readlink(f"/proc/self/fd/{handle}")), os.fstat(handle)
        if not path.is_relative_to(self.root):
            return
        self.held.append(os.dup(handle))
        content = self.names(path) if stat.S_ISDIR(status.st_mode) else path.read_bytes()
        folders = [self.root, *(each for each in self.root.rglob("*") if each.is_dir())]
        tree = {folder.stat().st_ino: self.names(folder) for folder in folders}
        self.log.append((status.st_ino, content, tree))

    @staticmethod
    def names(folder):
        return {entry.name: entry.inode() for entry in os.scandir(folder)}

    def cut(self, count, to, names):
        """What is there after the first `count` syncs. `names`: "synced", or "all", as a journal may do."""
        contents = {inode: content for inode, content, _ in self.log[:count]}
        folders = self.log[count - 1][2]

        def restore(inode, path):
            if inode not in folders:
                path.write_bytes(contents.get(inode, b""))
                return
            path.mkdir(parents=True, exist_ok=True)
            listed = contents.get(inode, {}) if names == "synced" else folders[inode]
            for name, each in listed.items():
                restore(each, path / name)

        restore(self.root.stat().st_ino, to)

    def close(self):
        for handle in self.held:
            os.close(handle)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=60, seed=0, progress=False)


def train(data, out):
    return main(["--data-root", str(data), "--out", str(out), *TINY])


def steps_on(out):
    """The step of the newest checkpoint, 0 if there is none; everything that is there must be whole."""
    kept = checkpoint.checkpoints(out / "checkpoints")
    for path in kept:
        assert checkpoint._load(path, torch.device("cpu"))["step"] == int(path.stem[5:])
    step = int(kept[-1].stem[5:]) if kept else 0
    log = out / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    trained = [record["step"] for record in records if record["split"] == "train" and record["step"] <= step]
    assert trained == list(range(2, step + 1, 2))
    best = out / "checkpoints" / "best.json"
    if best.exists():
        assert json.loads(best.read_bytes())["step"] <= step
    if (out / "config.json").exists():
        assert json.loads((out / "config.json").read_bytes())["latent_dim"] == 3
    if kept or (out / "model.safetensors").exists():
        assert BetaVAE.from_pretrained(out).sample(1).isfinite().all()
    for picture in [*out.glob("*.png"), *out.glob("*.gif")]:
        with Image.open(picture) as image:
            image.load()
    assert (out / completion.MARK).exists() == completion.is_marked(out)
    return step


@pytest.mark.parametrize("names", ["synced", "all"])
def test_whatever_was_synced_is_whole(data, tmp_path, monkeypatch, names):
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root, monkeypatch)
    assert train(data, root / "runs" / "run") == 0
    monkeypatch.undo()
    done = [0]
    for count in range(1, len(disk.log) + 1):
        after = tmp_path / str(count)
        disk.cut(count, after, names)
        out = after / "runs" / "run"
        if out.exists():
            done.append(steps_on(out))
        shutil.rmtree(after)
    assert sorted(set(done)) == [0, 4, 8, 10]
    assert done == sorted(done)  # nothing that was there is lost
    disk.cut(len(disk.log), tmp_path / "end", names)
    disk.close()
    assert completion.is_marked(tmp_path / "end" / "runs" / "run")


@pytest.mark.slow
@pytest.mark.parametrize("names", ["synced", "all"])
def test_a_run_resumes_after_a_cut_at_any_sync(data, tmp_path, monkeypatch, names):
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root, monkeypatch)
    assert train(data, root / "run") == 0
    monkeypatch.undo()
    weights = load_file(root / "run" / "model.safetensors")
    for count in range(1, len(disk.log) + 1):
        out = tmp_path / str(count) / "run"
        disk.cut(count, out.parent, names)
        if checkpoint.checkpoints(out / "checkpoints"):
            assert main(["--resume", str(out)]) == 0
            assert completion.is_marked(out)
            for name, value in load_file(out / "model.safetensors").items():
                assert torch.equal(value, weights[name]), (count, name)
        shutil.rmtree(out.parent)
    disk.close()


# ---- on ext4 ----------------------------------------------------------------------------------------------
def command(*words):
    return subprocess.run(list(map(str, words)), capture_output=True, text=True)


@contextlib.contextmanager
def mounted(image, at):
    at.mkdir(exist_ok=True)
    done = command("mount", "-o", "loop,commit=600", image, at)  # nothing is written for its own sake
    if done.returncode:
        pytest.skip(f"no loop device can be mounted: {done.stderr.strip()}")
    try:
        yield at
    finally:
        command("umount", "-l", at)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a file system: needs root")
@pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="needs mkfs.ext4")
def test_blocks_of_ext4(data, tmp_path):
    """The image is copied as soon as the run has ended: what it did not sync is not in it."""
    image, cut = tmp_path / "image", tmp_path / "cut"
    with open(image, "wb") as file:
        file.truncate(1 << 27)
    assert command("mkfs.ext4", "-q", "-F", image).returncode == 0
    with mounted(image, tmp_path / "before") as disk:
        out = disk / "runs" / "run"
        words = [sys.executable, "-m", "bvae.train", "--data-root", str(data), "--out", str(out), *TINY]
        subprocess.run(words, check=True, capture_output=True)
        (out / "not synced").write_text("a" * 10_000)
        shutil.copyfile(image, cut)
        weights = load_file(out / "model.safetensors")
    with mounted(cut, tmp_path / "after") as disk:
        out = disk / "runs" / "run"
        assert not (out / "not synced").exists()  # the copy was a power cut indeed
        assert steps_on(out) == 10
        assert completion.is_marked(out)
        for name, value in load_file(out / "model.safetensors").items():
            assert torch.equal(value, weights[name]), name


# ---- a reader beside a writer ------------------------------------------------------------------------------
READER = """
import sys
from safetensors.torch import load_file
from bvae import BetaVAE
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    BetaVAE.from_pretrained(sys.argv[1])
    mapped = load_file(sys.argv[1] + "/model.safetensors")
    sum(value.double().sum() for value in mapped.values())
"""


def test_a_reader_survives_a_writer(tmp_path):
    model = BetaVAE(3, 3, (4, 8), 32)
    model.save_pretrained(tmp_path)
    words = [sys.executable, "-c", READER, str(tmp_path), "10"]
    reader = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reader.stdout.readline() == b"ready\n"
    while reader.poll() is None:
        model.save_pretrained(tmp_path)
    assert reader.returncode == 0, reader.stderr.read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_two_writers_of_one_file(tmp_path):
    """The file of one of them, whole; not the bytes of both."""
    script = "import sys; from pathlib import Path; from bvae import files\nfor _ in range(200): "
    script += "files.write_bytes(Path(sys.argv[1]), sys.argv[2].encode() * 100_000)"
    words = [sys.executable, "-c", script, str(tmp_path / "file")]
    writers = [subprocess.Popen([*words, letter], stderr=subprocess.PIPE) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        with contextlib.suppress(FileNotFoundError):
            assert (tmp_path / "file").read_bytes() in (b"a" * 100_000, b"b" * 100_000)
    assert [writer.returncode for writer in writers] == [0, 0], [writer.stderr.read() for writer in writers]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_left_is_removed_when_it_is_old(tmp_path):
    old, new = tmp_path / "a.png.0.tmp", tmp_path / "b.png.0.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    files.remove_abandoned(tmp_path)
    assert not old.exists()
    assert new.exists()
