"""A run of 100 000 steps takes no more memory or file descriptors at its end than soon after its start."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bvae.pipelines import faces

STEPS, WARM = 100_000, 20_000
GROWTH = 5e6  # bytes
SMALLEST = [
    *(
        "--image-size",
        "32",
        "--hidden-dims",
        "1",
        "--latent-dim",
        "1",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ),
    *("--epochs", str(STEPS), "--max-steps", str(STEPS), "--log-every", "100", "--compile"),
]


def resident(pid):
    """Bytes of memory, without what is mapped from files."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise ProcessLookupError


def last_step(path):
    """Of a log that is being written; every line of it but the last must be whole."""
    *lines, _ = (path.read_text() if path.exists() else "").split("\n")
    return max((json.loads(line)["step"] for line in lines), default=0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_memory_and_descriptors(tmp_path, capsys):
    data = faces.write(tmp_path / "faces", n=40, seed=0, progress=False)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "bvae.train", "--data-root", str(data), "--out", str(out), *SMALLEST]
    seen = []  # step, bytes, descriptors
    with (
        open(tmp_path / "said", "w") as said,
        subprocess.Popen(
            command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ) as run,
    ):
        while run.poll() is None:
            time.sleep(0.5)
            step = last_step(out / "metrics.jsonl")
            if WARM <= step < STEPS:
                seen.append((step, resident(run.pid), len(os.listdir(f"/proc/{run.pid}/fd"))))
    assert run.returncode == 0, (tmp_path / "said").read_text()[-2000:]
    steps, memory, descriptors = zip(*seen, strict=True)
    part = len(seen) // 5
    assert part > 3
    growth = max(memory[-part:]) - max(memory[:part])
    with capsys.disabled():
        print(f"\n{growth / 1e6:+.2f} MB from step {steps[0]} to {steps[-1]}, of {memory[0] / 1e6:.0f} MB")
    assert growth < GROWTH
    assert min(descriptors[-part:]) <= min(descriptors[:part])  # a checkpoint that is written has one more
