"""Train a recipe from scratch, and measure how good its model is after how many seconds.

Only training is timed: the images are in memory, and the clocks stand still while the model is validated.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.race import synchronize
from bench.reference_step import PyTorchVAE, PyTorchVAEStep
from bvae.config import Config
from bvae.datasets import Data
from bvae.model import BetaVAE
from bvae.pipelines.loader import Loader
from bvae.training.distributed import Distributed
from bvae.training.schedule import lr_factor
from bvae.training.setup import OpenData, build_loss, prepare, switches
from bvae.training.step import autocast_dtype
from bvae.training.validation import Validation, validate

POINTS = 8  # validations on the way


class Point(NamedTuple):
    """A model on its way: the time it was trained for, and its quality."""

    step: int
    seconds: float
    cpu_seconds: float  # of all threads
    validation: Validation


def train_ours(config: Config, open_data: OpenData, device: torch.device) -> list[Point]:
    """Train as `python -m bvae.train` does; validate `POINTS` times and at the end."""
    with switches(config.training, device):
        run = prepare(config, None, device, Distributed(), data=open_data)

        def steps() -> Iterator[None]:
            for images in run.batches():
                run.advance(images)
                yield

        return _timed(steps(), run.steps, run.validate, device)


def train_baseline(
    config: Config, open_data: OpenData, device: torch.device, *, tuned: bool = False
) -> list[Point]:
    """Train PyTorch-VAE's network by its step, with the configuration's objective, rate and schedule.

    Args:
        tuned: with channels_last and fused Adam, and in the precision of the configuration.
    """
    with switches(config.training, device):
        data = open_data(config, config.training.batch_size, device, Distributed())
        config = config.resolve(len(data.train))
        objective, training, network = config.objective, config.training, config.model
        iters, weight = objective.capacity_iters, objective.kl_weight
        assert isinstance(iters, int)
        assert isinstance(weight, float)
        model = PyTorchVAE(network.latent_dim, network.hidden_dims, config.data.image_size).to(device)
        step = PyTorchVAEStep(
            model,
            kl_weight=weight,
            gamma=objective.gamma,
            max_capacity=objective.max_capacity,
            capacity_iters=iters,
            lr=training.lr,
            channels_last=tuned,
            fused=tuned or None,
            dtype=autocast_dtype(device, training.amp)[0] if tuned else None,
        )
        total, per_epoch = training.steps(len(data.train)), len(data.train)

        def steps() -> Iterator[None]:
            for number, images in enumerate(_batches(data.train, total), start=1):
                for group in step.optimizer.param_groups:
                    group["lr"] = training.lr * lr_factor(training, number, total, per_epoch)
                step((images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous())
                yield

        def result() -> Validation:
            return _validate_baseline(model, config, data)

        return _timed(steps(), total, result, device)


def _batches(loader: Loader, steps: int) -> Iterator[Tensor]:
    for epoch in range(-(-steps // len(loader))):
        for images, _ in loader.epoch(epoch):
            yield images


def _validate_baseline(model: PyTorchVAE, config: Config, data: Data) -> Validation:
    """The same measurement for both: PyTorch-VAE's weights in our model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pt")
        torch.save(model.state_dict(), path)
        ours = BetaVAE.from_pytorch_vae(path).to(data.valid.device)
    return validate(ours, build_loss(config.objective), data.valid, config.training.seed, None)


def _timed(
    steps: Iterator[None], total: int, result: Callable[[], Validation], device: torch.device
) -> list[Point]:
    """Run `total` steps; stop the clocks for a validation every so many steps, and at the end."""
    due = {round(total * number / POINTS) for number in range(1, POINTS + 1)}
    points, seconds, cpu_seconds = list[Point](), 0.0, 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    for number, _ in zip(range(1, total + 1), steps, strict=False):
        if number in due:
            synchronize(device)
            seconds += time.perf_counter() - wall
            cpu_seconds += time.process_time() - cpu
            points.append(Point(number, seconds, cpu_seconds, result()))
            wall, cpu = time.perf_counter(), time.process_time()
    return points
