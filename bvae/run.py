"""The parts of a training run: built from a configuration, saved and restored."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bvae import checkpoint
from bvae.arguments import Arguments, choose_device
from bvae.config import Config, ObjectiveConfig
from bvae.datasets import open_data
from bvae.losses import BetaLoss, CapacityLoss
from bvae.model import BetaVAE, build
from bvae.optimizer import build_optimizer
from bvae.pipelines.epochs import Epochs
from bvae.step import TrainingStep, autocast_dtype, compiles

ACTIVE = 0.01  # nats; a latent whose KL is above it is in use


def build_loss(objective: ObjectiveConfig) -> BetaLoss | CapacityLoss:
    """The loss of a resolved objective; it takes the decoder's raw output."""
    options: dict[str, Any] = {
        "kl_weight": objective.kl_weight,
        "reduction": objective.recon,
        "likelihood": objective.likelihood,
        "activation": "tanh" if objective.likelihood == "gaussian" else None,
        "decoder_variance": objective.decoder_variance,
    }
    if objective.loss_type == "B":
        assert objective.capacity_iters != "auto"
        return CapacityLoss(objective.gamma, objective.max_capacity, objective.capacity_iters, **options)
    return BetaLoss(1.0 if objective.loss_type == "VAE" else objective.beta, **options)


def free_run_folder(config: Config) -> Path:
    """The first runs/<data>-<loss>-<number> that does not exist."""
    number = 1
    while (out := Path("runs") / f"{config.data.name}-{config.objective.loss_type}-{number}").exists():
        number += 1
    return out


@dataclass
class Run:
    """Everything that training needs, ready to go."""

    config: Config  # resolved
    out: Path
    model: BetaVAE
    loss: BetaLoss | CapacityLoss
    optimizer: torch.optim.Optimizer
    step: TrainingStep
    train: Epochs
    valid: Epochs
    done: int = 0  # steps

    @property
    def steps(self) -> int:
        """Steps in the whole run."""
        return self.config.training.steps(len(self.train))

    @property
    def lr(self) -> float:
        """The learning rate of the next step: a function of its epoch."""
        training = self.config.training
        return training.lr * training.lr_gamma ** (self.done // len(self.train))

    def advance(self, images: Tensor) -> None:
        """One training step on uint8 images [B, H, W, C]."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.step(images)
        self.done += 1

    def metrics(self) -> dict[str, float]:
        """What the last step's log record says of the objective; waits for the device.

        Raises:
            FloatingPointError: a loss since the last call is not finite; names its step.
        """
        scalars = self.step.read(self.done)
        n_pixels = math.prod(self.model.input_shape)
        objective = self.config.objective
        # The papers sum the reconstruction over pixels, and their beta weighs the KL against that sum.
        summed = n_pixels if objective.recon == "mean" else 1
        beta = objective.weight_on_kl * summed
        return {
            **scalars,
            "recon_nats": scalars["recon"] * summed,
            "beta_norm": beta * self.model.latent_dim / n_pixels,  # Higgins et al. 2017: beta M / N
            "active_units": int((self.step.kl_per_dim > ACTIVE).sum()),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def save(self) -> Path:
        """Write a checkpoint, unless the weights or the last losses are not finite.

        Raises:
            FloatingPointError: they are not; the checkpoints before stay as they are.
            OSError: it cannot be written; the same.
        """
        self.step.read(self.done)
        for name, value in self.model.state_dict().items():
            if not value.isfinite().all():
                raise FloatingPointError(f"{name} is not finite after step {self.done}")
        state = {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "step": self.done,
            "images": self.train.count,
            "config": self.config.to_yaml(),
        }
        return checkpoint.save(self.out / checkpoint.FOLDER, self.done, state)

    def restore(self) -> None:
        """Go back to the newest checkpoint of the run folder.

        Raises:
            FileNotFoundError, ValueError: there is none, it is damaged, or the data have changed.
        """
        state = checkpoint.load_newest(self.out / checkpoint.FOLDER, self.step.step.device)
        if state["images"] != self.train.count:
            raise ValueError(
                f"{self.out} was trained on {state['images']} images, the data now hold "
                f"{self.train.count}: the run cannot go on as it would have"
            )
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step.scaler.load_state_dict(state["scaler"])
        self.done = state["step"]
        self.step.restore(self.done)
        if self.done > self.steps:
            raise ValueError(
                f"{self.out} is at step {self.done} already, beyond the {self.steps} asked for: "
                "raise --epochs or --max-steps"
            )


def _check_writable(out: Path) -> None:
    """Raise now what would otherwise end the run after the data have been decoded."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file: name another run folder with --out")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{nearest} cannot be written: name another run folder with --out")


def prepare(arguments: Arguments) -> Run:
    """Open the data, build the parts, make the run folder or restore its newest checkpoint."""
    config = arguments.settings
    out = arguments.resume or arguments.out or free_run_folder(config)
    if out.exists() and not arguments.resume:
        raise FileExistsError(
            f"{out} exists: name another folder with --out, or continue with --resume {out}"
        )
    _check_writable(out)
    device = choose_device(arguments.device)
    training = config.training
    train, valid, bad = open_data(config.data, training.batch_size, training.seed, device)
    given, config = config, config.resolve(len(train))
    if config.data.root:  # a checkpoint may be resumed from another folder
        config = replace(config, data=replace(config.data, root=config.data.root.resolve()))

    torch.manual_seed(training.seed)
    model = build(config).to(device)
    model.to(memory_format=torch.channels_last)  # what tensor cores want; faster on a CPU too
    loss = build_loss(config.objective).to(device)
    optimizer = build_optimizer(training, model.parameters())
    dtype, precision = autocast_dtype(device, training.amp)
    compiled, execution = compiles(device, training.compile)
    step = TrainingStep(
        model,
        loss,
        optimizer,
        seed=training.seed,
        dtype=dtype,
        compile=compiled,
        history=min(training.log_every, training.steps(len(train))),
    )
    run = Run(config, out, model, loss, optimizer, step, train, valid)
    if arguments.resume:
        run.restore()
    else:
        out.mkdir(parents=True)
    (out / "config.yaml").write_text(given.to_yaml())
    if bad:
        (out / "bad_files.txt").write_text("".join(f"{file}\t{text}\n" for file, text in bad))
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{train.count} training and {valid.count} validation images; {where}; {precision}; "
        f"{execution}; steps {run.done} to {run.steps}; run folder {out}",
        flush=True,
    )
    return run
