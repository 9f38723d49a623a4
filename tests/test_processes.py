"""Several processes: the same numbers as one, each failure named, resumed with another number of them."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tiny import NETWORK

from bvae.pipelines import faces
from bvae.train import main
from bvae.training.distributed import Distributed, init_distributed

TINY = [
    *NETWORK,
    *("--log-every", "5", "--checkpoint-every", "7", "--no-compile"),
]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """120 training images: 7 steps an epoch."""
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=150, seed=0, progress=False)


def torchrun(processes: int, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, *TORCHRUN, str(processes), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(job: subprocess.Popen) -> tuple[int, str, str]:
    out, err = job.communicate(timeout=120)
    return job.returncode, out, err


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory):
    """The weights after ten steps, by number of processes, dtype and optimizer."""
    folder, known = tmp_path_factory.mktemp("steps"), {}
    worker = Path(__file__).with_name("worker.py")

    def of(processes: int, dtype: str, optimizer: str) -> dict[str, torch.Tensor]:
        job = processes, dtype, optimizer
        if job not in known:
            out = folder / f"{'-'.join(map(str, job))}.pt"
            status, _, err = finish(torchrun(processes, worker, out, dtype, optimizer))
            assert status == 0, err
            known[job] = torch.load(out)
        return known[job]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "dtype", "optimizer", "tolerance"),
    [
        (2, "float64", "adam", 1e-9),
        (4, "float64", "adam", 1e-9),
        (2, "float32", "adam", 1e-4),
        (4, "float32", "adam", 1e-4),
        (2, "float64", "muon", 1e-9),
    ],
)
def test_shares_of_a_batch_are_the_batch(ten_steps, processes, dtype, optimizer, tolerance):
    alone, together = (ten_steps(number, dtype, optimizer) for number in (1, processes))
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.slow
def test_a_job_trains_stops_and_goes_on_with_more_processes(data, tmp_path):
    out = tmp_path / "run"
    options = ("-m", "bvae.train", "--data-root", data, "--cache-dir", tmp_path / "cache", *TINY)
    status, said, err = finish(torchrun(2, *options, "--out", out, "--epochs", 2, "--accumulate", 2))
    assert status == 0, err
    assert "2 processes, 8 images each per step" in said
    assert said.count("results: ") == 1

    job = torchrun(4, "-m", "bvae.train", "--resume", out, "--epochs", 400)
    lines = (out / "metrics.jsonl").read_text
    while len(lines().splitlines()) < 8 and job.poll() is None:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, said, err = finish(job)
    assert "continue with: " in said, err
    assert main(["--resume", str(out), "--max-steps", "200"]) == 0
    records = [json.loads(line) for line in lines().splitlines()]
    steps = [record["step"] for record in records if record["split"] == "train"]
    assert steps == [5, 10, 14, *range(15, 201, 5)]


FIT_WITH_A_CALLBACK_THAT_FAILS_ON_RANK_0 = """
import os, sys, torch
from bvae import fit

class Broken:
    def on_log(self, step, values):
        if os.environ["RANK"] == "0":
            raise KeyError("of the user's")

images = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8)
tiny = {"hidden_dims": (4, 8), "latent_dim": 2, "batch_size": 8, "max_steps": 6, "log_every": 2}
fit(images, callbacks=[Broken()], out=sys.argv[1], device="cpu", compile=False, **tiny)
"""


@pytest.mark.slow
def test_a_callback_that_fails_on_one_rank_aborts_no_other(tmp_path):
    """A checkpoint needs all ranks: this one would average its statistics with the other's gradients."""
    script, out = tmp_path / "fit.py", tmp_path / "run"
    script.write_text(FIT_WITH_A_CALLBACK_THAT_FAILS_ON_RANK_0)
    status, _, err = finish(torchrun(2, script, out))
    assert status != 0
    assert 'KeyError: "of the user\'s"' in err
    assert "SIGABRT" not in err
    assert not list(out.glob("checkpoints/*"))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_with_a_message(data, tmp_path):
    out = tmp_path / "run"
    options = ("-m", "bvae.train", "--data-root", data, "--out", out, "--epochs", 10_000, *TINY)
    job = torchrun(2, *options)
    while not (out / "metrics.jsonl").exists() and job.poll() is None:
        time.sleep(0.1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    second = next(pid for pid in children if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    os.kill(int(second), signal.SIGKILL)
    status, _, err = finish(job)
    assert status != 0
    assert "error in rank 0: another process has ended: its message says why" in err


def test_more_processes_than_a_batch_can_feed_are_named(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bvae.training.setup.init_distributed", lambda device: Distributed(0, 3))
    monkeypatch.setattr("bvae.training.distributed.Distributed.broadcast", lambda self, value: value)
    assert main(["--data-root", str(data), "--out", str(tmp_path / "run"), *TINY]) == 2
    assert "--batch-size 16 cannot be cut into 3 equal parts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "device", "text"),
    [
        ({"RANK": "0"}, "cpu", "WORLD_SIZE is set, but not LOCAL_RANK and MASTER_ADDR and MASTER_PORT"),
        (
            {"RANK": "0", "LOCAL_RANK": "99", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "cuda",
            "more processes than GPUs: local rank 99",
        ),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"},
            "cpu",
            "rank 0 could not connect to the others at nowhere.invalid:1",
        ),
    ],
    ids=["incomplete", "too few GPUs", "nobody there"],
)
def test_a_meeting_that_cannot_be_is_named(monkeypatch, environment, device, text):
    monkeypatch.setattr("bvae.training.distributed.START_TIMEOUT", timedelta(seconds=1))
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=text):
        init_distributed(torch.device(device))


def test_a_torchrun_that_is_none_is_named_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--device", "cpu"]) == 2
    assert "error: WORLD_SIZE is set, but not RANK and LOCAL_RANK" in capsys.readouterr().err
