"""A training run: its parts, one step, and its state saved; `restore.py` restores it."""

import hashlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, repeat
from pathlib import Path

import torch
from torch import Tensor, nn

from bvae.config import Config
from bvae.model import BetaVAE
from bvae.pipelines.loader import Loader
from bvae.pipelines.memory_loaders import DeviceLoader
from bvae.training import checkpoint
from bvae.training.conditions import conditions
from bvae.training.distributed import Distributed
from bvae.training.schedule import lr_factor
from bvae.training.step import DiscriminatorDiverged, NotFinite, Scalars, TrainingStep
from bvae.training.validation import ACTIVE_KL, Validation, validate

PAUSE = 10  # seconds between checkpoints: they and validations must take a small part of the time


@dataclass
class Run:
    """Everything that training needs."""

    config: Config  # resolved
    out: Path | None  # the run folder; None writes nothing
    model: BetaVAE
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    step: TrainingStep
    train: Loader
    valid: Loader
    files: list[str]  # of the training images; empty if they are drawn
    distributed: Distributed
    pixels: str = ""  # a checksum of all images; empty if it is not known
    decoder: str = ""  # of images without a checksum, with its version
    loss_is_given: bool = False  # passed by the caller, not built from the configuration
    done: int = 0  # steps
    due: bool = False  # whether a validation follows the last checkpoint
    _saved_at: float = field(default_factory=time.monotonic)

    @property
    def steps(self) -> int:
        """Steps in the whole run."""
        return self.config.training.steps(len(self.train))

    def lr_factor(self, step: int) -> float:
        """The schedule's factor on the learning rates in a step; the first step is 1."""
        return lr_factor(self.config.training, step, self.steps, len(self.train))

    def epoch(self, step: int) -> int:
        """The epoch of a step; both start at 1."""
        return (step - 1) // len(self.train) + 1

    def batches(self) -> Iterator[Tensor | None]:
        """Yield uint8 images [B, H, W, C] for each remaining step; None if the step gathers its own."""
        while self.done < self.steps:
            number, start = divmod(self.done, len(self.train))
            if self.step.gathers and isinstance(self.train, DeviceLoader):
                self.train.begin(number)
                epoch: Iterator[Tensor | None] = repeat(None, len(self.train) - start)
            else:
                epoch = (images for images, _ in self.train.epoch(number, start))
            yield from islice(epoch, self.steps - self.done)

    def advance(self, images: Tensor | None) -> None:
        """One training step on the images from `batches`."""
        self.step.set_lr_factor(self.lr_factor(self.done + 1))
        self.done += 1
        self.step(images)

    def is_due(self) -> bool:
        """Whether a checkpoint and a validation follow this step."""
        if self.done == self.steps:
            return True
        if every := self.config.training.checkpoint_every:
            return self.done % every == 0
        if self.done % len(self.train):
            return False
        return self.distributed.broadcast(time.monotonic() - self._saved_at > PAUSE)

    def metrics(self, scalars: Scalars) -> dict[str, float]:
        """The values of a step's log record."""
        values = {
            "loss": scalars.loss,
            "recon": scalars.recon,
            "kld": scalars.kld,
            "capacity": scalars.capacity,
            "mse": scalars.mse,
            "active_units": sum(kl > ACTIVE_KL for kl in scalars.kl_per_dim),
            "lr": self.optimizer.param_groups[0]["initial_lr"] * self.lr_factor(scalars.step),
        }
        if self.step.penalty is not None:
            values["penalty"] = scalars.penalty
        if self.step.discriminator_optimizer is not None:
            values["discriminator"] = scalars.discriminator
        if self.loss_is_given:  # the configuration does not describe it
            return values
        n_pixels = math.prod(self.model.input_shape)
        objective = self.config.objective
        # The papers sum the reconstruction over pixels, and their beta weighs the KL against that sum.
        summed = n_pixels if objective.recon == "mean" else 1
        beta = objective.weight_on_kl * summed
        values["recon_nats"] = scalars.recon * summed
        values["beta_norm"] = beta * self.model.latent_dim / n_pixels  # Higgins et al. 2017: beta M / N
        return values

    def images(self, step: int) -> list[str]:
        """The files of the images of a step's batch, or their numbers if they have no files."""
        index = self.train.indices(*divmod(step - 1, len(self.train))).tolist()
        return [self.files[i] if self.files else f"image {i}" for i in index]

    @property
    def conditions(self) -> dict[str, str]:
        """What the bits of a step depend on, besides the configuration, the images and the versions."""
        return conditions(self.step.device, self.distributed.world_size, self.decoder)

    @cached_property
    def listing(self) -> str:
        """A checksum of the training images' names, relative to their common folder."""
        common = os.path.commonpath([os.path.dirname(name) for name in self.files]) if self.files else ""
        names = "\n".join(name[len(common) :].lstrip(os.sep) for name in self.files)
        return hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def save(self, due: bool) -> None:
        """Average BatchNorm's statistics over the ranks, and write a checkpoint on rank 0.

        Args:
            due: whether a validation follows, which a resumed run makes up for if this one is stopped.

        Raises:
            NotFinite: a weight is NaN or infinite; the older checkpoints are unchanged.
            OSError: the checkpoint cannot be written; the older ones are unchanged.
        """
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        self.distributed.all_reduce_mean(statistics)  # each rank has its own; only gradients are averaged
        penalty, optimizer = self.step.penalty, self.step.discriminator_optimizer
        discriminator = penalty.state_dict() if penalty else {}  # other penalties have no state
        for name, value in self.model.state_dict().items():
            if not value.isfinite().all():
                raise NotFinite(f"{name} is not finite", self.done)
        for name, value in discriminator.items():
            if not value.isfinite().all():
                raise DiscriminatorDiverged(f"{name} is not finite", self.done)
        self._saved_at = time.monotonic()
        if self.out is None or not self.distributed.is_main:
            return
        state = {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator": discriminator,
            "discriminator_optimizer": optimizer.state_dict() if optimizer else {},
            "scaler": self.step.scaler.state_dict(),
            "step": self.done,
            "due": due,
            "images": self.train.count,
            "files": self.listing,
            "pixels": self.pixels,
            "conditions": self.conditions,
            "config": self.config.to_yaml(),
        }
        checkpoint.save(self.out / checkpoint.FOLDER, self.done, state)

    def validate(self) -> Validation:
        """Run the model over the validation images."""
        seed = self.config.training.seed
        places = self.step.dtype, self.distributed, self.step.penalty
        return validate(self.model, self.loss, self.valid, seed, *places)

    def mark_best(self, result: Validation) -> None:
        """Mark the checkpoint of this step if it is the best, on rank 0. Raises OSError."""
        if self.out and self.distributed.is_main:
            checkpoint.mark_best(self.out / checkpoint.FOLDER, self.done, result.elbo)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """End this rank's part in the job; no training is possible afterwards."""
        self.step.release()  # NCCL waits for the end of every graph that uses its connections
        self.distributed.close()
