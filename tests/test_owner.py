"""A run folder has one owner: names claimed, locks that a killed process leaves, `--resume auto`."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import NETWORK

from bvae import files
from bvae.errors import UsageError, say_once
from bvae.evaluation.options import SweepOptions
from bvae.evaluation.sweeping import sweep
from bvae.model import BetaVAE
from bvae.owner import LOCK, own
from bvae.pipelines import faces
from bvae.train import main
from bvae.training import step
from bvae.training.claim import claim
from bvae.training.distributed import Distributed, init_distributed
from bvae.training.signals import StopRequest

TINY = [*NETWORK, "--no-compile", *("--log-every", "2", "--checkpoint-every", "3", "--max-steps", "8")]
HOLD = """
import sys
from pathlib import Path
from bvae.owner import own
with own(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""
UNSUPPORTED = ["EINVAL", "ENOTSUP", "ENOLCK"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=40, seed=0, progress=False)


@pytest.fixture
def holder(tmp_path):
    """Another process that owns the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def run(data, out, *options):
    return main(["--data-root", str(data), "--out", str(out), *TINY, *options])


# ---- names and locks ---------------------------------------------------------------------------------------


def test_runs_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with claim(None, "faces-B", Distributed()) as first, claim(None, "faces-B", Distributed()) as second:
        assert (first, second) == (Path("runs/faces-B-1"), Path("runs/faces-B-2"))
        real = Path.exists  # as if it had looked before the others made theirs
        monkeypatch.setattr(Path, "exists", lambda path: real(path) and "faces-B" not in path.name)
        with claim(None, "faces-B", Distributed()) as third:
            assert third == Path("runs/faces-B-3")
        with pytest.raises(UsageError, match="faces-B-1 exists"), claim(first, "", Distributed()):
            pass
    monkeypatch.undo()
    assert not list((tmp_path / "runs").iterdir())  # nothing was written into them


def test_a_second_owner_is_refused_by_name(tmp_path, holder):
    with pytest.raises(UsageError, match=f"{tmp_path} is in use by process {holder.pid} on "), own(tmp_path):
        pass


def test_a_killed_owner_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with own(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_run_that_goes_on_is_not_resumed(data, tmp_path, capsys):
    assert run(data, tmp_path / "run") == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with own(tmp_path / "run"):
        capsys.readouterr()
        assert main(["--resume", str(tmp_path / "run"), "--max-steps", "9"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path / 'run'} is in use by process {os.getpid()} on ")
        assert len(error.splitlines()) == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert main(["--resume", str(tmp_path / "run"), "--max-steps", "9"]) == 0


def test_a_sweep_has_one_owner(tmp_path):
    options = SweepOptions("locatello_sprites_beta4", grid=("beta=1,4",), out=tmp_path, device="cpu")
    with own(tmp_path), pytest.raises(UsageError, match="is in use by process"):
        sweep(options, [])


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_file_system_without_locks(data, tmp_path, monkeypatch, capsys, name):
    def refuse(*_):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(fcntl, "flock", refuse)
    say_once.cache_clear()
    assert run(data, tmp_path / "run", "--cache-dir", str(tmp_path / "cache")) == 0
    error = capsys.readouterr().err
    assert error.count("no locks on this file system") == 2  # of the run folder and of the cache
    assert "Traceback" not in error


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_file_system_without_fsync_of_folders(tmp_path, monkeypatch, capsys, name):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    say_once.cache_clear()
    for text in ("a", "b"):
        files.write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "b"
    assert capsys.readouterr().err.count("this file system cannot sync it") == 1


def test_an_error_of_an_open_file_names_its_path(tmp_path):
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match=str(tmp_path / "file")):
        files.write(tmp_path / "file", fail, 1)


# ---- --resume auto -----------------------------------------------------------------------------------------


def stop_at(monkeypatch, number, what):
    original = step.TrainingStep.__call__

    def stopped(self, images):
        original(self, images)
        if int(self.step) == number:
            what()

    monkeypatch.setattr(step.TrainingStep, "__call__", stopped)


def test_one_command_starts_and_resumes(data, tmp_path, monkeypatch, capsys):
    assert run(data, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(data, tmp_path / "run", "--resume", "auto") == 0
    assert "stopped at step 4 of 8" in capsys.readouterr().out
    assert run(data, tmp_path / "run", "--resume", "auto") == 0
    assert "steps 4 to 8" in capsys.readouterr().out
    assert run(data, tmp_path / "run", "--resume", "auto", "--max-steps", "9", "--capacity-iters", "4") == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert whole.keys() == parts.keys()


def test_resumed_by_auto_is_the_run_never_stopped(data, tmp_path, monkeypatch):
    assert run(data, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        run(data, tmp_path / "run", "--resume", "auto")
    assert run(data, tmp_path / "run", "--resume", "auto") == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_auto_starts_again_what_stopped_before_a_checkpoint(data, tmp_path, monkeypatch, capsys):
    def crash():
        raise RuntimeError("a crash")

    with monkeypatch.context() as patch:
        stop_at(patch, 3, crash)
        with pytest.raises(RuntimeError, match="a crash"):
            run(data, tmp_path / "run", "--resume", "auto", "--log-every", "1")
    assert (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(data, tmp_path / "run") == 2
    assert "exists: name another folder" in capsys.readouterr().err
    assert run(data, tmp_path / "run", "--resume", "auto") == 0
    steps = [
        line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"train"' in line
    ]
    assert len(steps) == 4


def test_auto_says_which_batch_size_it_keeps(data, tmp_path, capsys):
    options = ["--resume", "auto", "--batch-size", "8"]
    assert run(data, tmp_path / "run", *options) == 0
    capsys.readouterr()
    assert run(data, tmp_path / "run", *options, "--max-steps", "9") == 0
    assert "is not used" not in capsys.readouterr().out
    assert run(data, tmp_path / "run", *options[:2], "--batch-size", "16", "--max-steps", "10") == 0
    said = f"--batch-size 16 is not used: {tmp_path / 'run'} continues with its batch size of 8\n"
    assert said in capsys.readouterr().out
    assert run(data, tmp_path / "run", *options[:2], "--batch-size", "4") == 2
    assert "--resume cannot change training.batch_size from 8 to 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--latent-dim", "4"], "--resume cannot change model.latent_dim from 3 to 4"),
        (["--debug-nan"], "--debug-nan needs --resume and the folder"),
    ],
)
def test_what_auto_refuses(data, tmp_path, capsys, options, message):
    assert run(data, tmp_path / "run") == 0
    assert run(data, tmp_path / "run", "--resume", "auto", *options) == 2
    assert message in capsys.readouterr().err


def test_auto_needs_a_folder_of_its_own(data, tmp_path, capsys):
    assert main(["--data-root", str(data), "--resume", "auto", *TINY]) == 2
    assert "--resume auto needs --out" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("precious")
    assert run(data, tmp_path, "--resume", "auto") == 2
    assert f"{tmp_path} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ---- signals, streams, schedulers --------------------------------------------------------------------------


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("streams", [pytest.param("stdout", marks=pytest.mark.slow), "both"])
def test_a_reader_that_is_gone_ends_no_run(data, tmp_path, streams):
    command = [
        sys.executable,
        "-m",
        "bvae.train",
        "--data-root",
        str(data),
        "--out",
        str(tmp_path / "run"),
        *TINY,
    ]
    read, write = os.pipe()
    os.close(read)
    stderr = write if streams == "both" else subprocess.PIPE
    done = subprocess.run(command, stdout=write, stderr=stderr, timeout=120)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert not done.stderr or b"BrokenPipe" not in done.stderr
    assert (tmp_path / "run" / "traversals.gif").exists()


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("utf-8", "gbk"))]
)
def test_names_that_no_stream_can_encode(data, tmp_path, encoding):
    odd = tmp_path / os.fsdecode(b"caf\xe9-\xe5\x9b\xbe")
    command = [sys.executable, "-m", "bvae.train", "--data-root", str(data), "--out", str(odd), *TINY]
    done = subprocess.run(
        command, capture_output=True, timeout=120, env=os.environ | {"PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0, done.stderr
    assert b"results: " in done.stdout
    assert done.stderr.count(b"TensorBoard cannot write") == 1
    BetaVAE.from_pretrained(odd)


def test_names_with_a_newline_take_one_line_in_a_list(data, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(sorted((data / "img_align_celeba").iterdir())):
        (folder / f"{number}.jpg").write_bytes(image.read_bytes())
    (folder / "a\nb.jpg").write_bytes(b"")
    assert (
        run(
            folder,
            tmp_path / "run",
            "--data",
            "folder",
            "--on-bad",
            "skip",
            "--cache-dir",
            str(tmp_path / "c"),
        )
        == 0
    )
    (line,) = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    assert "a\\nb.jpg\t" in line


def test_tasks_of_slurm_that_do_not_know_each_other_are_named(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    say_once.cache_clear()
    init_distributed(torch.device("cpu"))
    assert "SLURM has 4 tasks, and this run is a single process" in capsys.readouterr().err
