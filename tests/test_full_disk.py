"""The disk is full from some write of a run on: a message, status 1, and it goes on once there is room."""

import builtins
import errno
import io
import os

import pytest
import torch
from safetensors.torch import load_file
from tiny import NETWORK

from bvae.pipelines import faces
from bvae.train import main
from bvae.training import checkpoint

OPTIONS = [
    *NETWORK,
    "--no-compile",
    *("--decoder", "torchvision", "--max-steps", "6", "--log-every", "2", "--checkpoint-every", "2"),
]


class Disk:
    """Stands in for `open`: below a folder, so many writes succeed, and none after them."""

    def __init__(self, where, fails_at):
        self.where, self.fails_at, self.writes = str(where), fails_at, 0
        self.open = io.open

    def __call__(self, file, mode="r", *options, **named):
        if (
            isinstance(file, int)
            or named.get("opener")
            or not os.fsdecode(file).startswith(self.where)
            or not set(mode) & set("wax+")
        ):
            return self.open(file, mode, *options, **named)
        raw = File(self, file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, "utf-8", write_through=True)


class File(io.FileIO):
    def __init__(self, disk, *options):
        super().__init__(*options)
        self.disk = disk

    def write(self, data):
        self.disk.writes += 1
        if self.disk.fails_at is not None and self.disk.writes > self.disk.fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=100, seed=0, progress=False)


def train(data, where, fails_at=None):
    """The status of a run, and how many writes it made."""
    disk = Disk(where, fails_at)
    places = ["--data-root", str(data), "--out", str(where / "run"), "--cache-dir", str(where / "cache")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", disk)
        patch.setattr(io, "open", disk)
        return main([*OPTIONS, *places]), disk.writes


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run on a disk with room: its weights and its writes."""
    where = tmp_path_factory.mktemp("whole")
    status, writes = train(data, where)
    assert status == 0
    return load_file(where / "run" / "model.safetensors"), writes


def fails_and_goes_on(data, where, whole, fails_at, capsys):
    weights, _ = whole
    capsys.readouterr()
    assert train(data, where, fails_at)[0] == 1, fails_at
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "are free" in error
    assert "Traceback" not in error
    out = where / "run"
    if kept := checkpoint.checkpoints(out / "checkpoints"):
        assert checkpoint.load_newest(out / "checkpoints", torch.device("cpu"))
        assert f"The last good checkpoint is {kept[-1].name}" in error
        assert main(["--resume", str(out)]) == 0
        for name, value in load_file(out / "model.safetensors").items():
            assert torch.equal(value, weights[name]), name
    else:
        assert not list(where.glob("cache/*.unfinished"))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.4, 0.7, 0.9])
def test_some_writes(data, whole, tmp_path, capsys, part):
    fails_and_goes_on(data, tmp_path, whole, int(part * whole[1]), capsys)


@pytest.mark.slow
def test_every_write(data, whole, tmp_path, capsys):
    for fails_at in range(whole[1]):
        fails_and_goes_on(data, tmp_path / str(fails_at), whole, fails_at, capsys)
