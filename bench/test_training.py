"""End to end: from JPEG files on disk to the last step of a short run, against PyTorch-VAE's loop.

Ours decodes the files once, into a cache with checksums; with a warm cache they are already decoded. Its time
includes what PyTorch-VAE's loop does not do: a validation after each epoch, and checkpoints. Starting Python
is in neither time. If ours is compiled, the compiler's cache has the code, as in a user's second run.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

pytest.importorskip("tyro", reason="bvae.train, whose command line this runs, needs tyro")

from bench import reference_loop
from bench.race import clock
from bvae.pipelines import faces
from bvae.training.cli import parse
from bvae.training.loop import train
from bvae.training.monitor import Monitor
from bvae.training.setup import open_run
from bvae.training.signals import StopRequest

GPU = torch.cuda.is_available()
N, EPOCHS = (12_000, 12) if GPU else (1_440, 2)  # faces, of which four in five are for training
# Both update by Adam with the same schedule; bench/test_quality.py compares recipes.
ADAM = ["--optimizer", "adam", "--lr", "2e-3", "--schedule", "exponential", "--lr-gamma", "0.8"]
SETTINGS = ["--amp"] if GPU else ["--config", "faces_cpu", *ADAM]
AGREEMENT = 0.25  # of the MSE at the end, from other weights and in another order


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faces.write(tmp_path_factory.mktemp("jpegs"), n=N, progress=False)


def test_training(root: Path, device: torch.device, race: Callable[..., Any], tmp_path: Path) -> None:
    numbers = itertools.count()
    argv = [*SETTINGS, "--data", "faces", "--data-root", str(root), "--epochs", str(EPOCHS)]
    files = sorted(str(path) for path in Path(root, "img_align_celeba").iterdir())[: N * 4 // 5]
    settings = parse(argv, "").settings
    config = settings.resolve(len(files) // settings.training.batch_size)
    errors: dict[str, float] = {}

    def baseline_loop() -> None:
        errors["PyTorch-VAE's loop"] = sum(reference_loop.train(files, config, device)[-3:]) / 3

    def ours(cache: Path) -> None:
        torch._dynamo.reset()  # each run compiles its own step
        out = tmp_path / f"run-{next(numbers)}"
        arguments = parse([*argv, "--cache-dir", str(cache), "--out", str(out)], "")
        with open_run(arguments) as run, Monitor(run) as monitor, StopRequest() as stop:
            assert run.config.objective == config.objective
            assert train(run, monitor, stop)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        errors["ours"] = [line["mse"] for line in lines if "mse" in line][-1]

    def gate() -> dict[str, float]:
        first_calls = {"PyTorch-VAE's loop": clock(baseline_loop, device), "ours": clock(warm, device)}
        expected, mse = errors["PyTorch-VAE's loop"], errors["ours"]
        assert abs(mse - expected) <= AGREEMENT * expected, f"our MSE is {mse}, PyTorch-VAE's {expected}"
        return first_calls

    def warm() -> None:
        ours(tmp_path / "cache")

    race(
        "training",
        f"{EPOCHS} epochs of {len(files)} JPEGs",
        gate=gate,
        prepare=lambda: {
            "PyTorch-VAE's loop": baseline_loop,
            "ours": lambda: ours(tmp_path / f"cache-{next(numbers)}"),
            "ours, warm cache": warm,
        },
        rounds=3,
        single=True,
        images=EPOCHS * (len(files) // config.training.batch_size) * config.training.batch_size,
        headline=f"From JPEGs to a trained model, {EPOCHS} epochs of {len(files)}"
        + ", compiled before" * GPU,
    )
