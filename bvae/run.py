"""The parts of a training run: built from a configuration, saved and restored."""

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bvae import checkpoint, compiler
from bvae.arguments import Arguments, choose_device
from bvae.config import Config, ObjectiveConfig, TrainingConfig
from bvae.datasets import find, open_data
from bvae.kernels import launch
from bvae.losses import BetaLoss, CapacityLoss
from bvae.model import BetaVAE, build
from bvae.optimizer import build_optimizer
from bvae.pipelines.epochs import Epochs
from bvae.pipelines.resident import Resident
from bvae.processes import Processes, join
from bvae.step import NotFinite, Scalars, TrainingStep, autocast_dtype, captures, compiles
from bvae.validation import Validation

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
    files: list[str]  # of the training images; none where they are drawn
    processes: Processes
    done: int = 0  # steps

    @property
    def steps(self) -> int:
        """Steps in the whole run."""
        return self.config.training.steps(len(self.train))

    def lr(self, step: int) -> float:
        """The learning rate of a step, 1 on the first: a function of its epoch."""
        training = self.config.training
        return training.lr * training.lr_gamma ** ((step - 1) // len(self.train))

    def batches(self) -> Iterator[Tensor | None]:
        """For each step in the rest of the epoch uint8 images [B, H, W, C]; None where it gathers them."""
        number, start = divmod(self.done, len(self.train))
        if self.step.gathers and isinstance(self.train, Resident):
            self.train.begin(number)
            yield from repeat(None, len(self.train) - start)
        else:
            for images, _ in self.train.epoch(number, start):
                yield images

    def advance(self, images: Tensor | None) -> None:
        """One training step on what `batches` gave."""
        if self.done % len(self.train) == 0:  # an epoch begins
            self.step.set_lr(self.lr(self.done + 1))
        self.done += 1
        self.step(images)

    def metrics(self, scalars: Scalars) -> dict[str, float]:
        """What a step's log record says of the objective."""
        n_pixels = math.prod(self.model.input_shape)
        objective = self.config.objective
        # The papers sum the reconstruction over pixels, and their beta weighs the KL against that sum.
        summed = n_pixels if objective.recon == "mean" else 1
        beta = objective.weight_on_kl * summed
        return {
            "loss": scalars.loss,
            "recon": scalars.recon,
            "kld": scalars.kld,
            "capacity": scalars.capacity,
            "mse": scalars.mse,
            "recon_nats": scalars.recon * summed,
            "beta_norm": beta * self.model.latent_dim / n_pixels,  # Higgins et al. 2017: beta M / N
            "active_units": sum(kl > ACTIVE for kl in scalars.kl_per_dim),
            "lr": self.lr(scalars.step),
        }

    def synchronize(self) -> None:
        """Give all processes the mean of their BatchNorm statistics, which no gradient keeps together."""
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        self.processes.average(statistics)

    def images(self, step: int) -> list[str]:
        """The files, or where there are none the numbers, of the images of a step's batch."""
        index = self.train.indices(*divmod(step - 1, len(self.train))).tolist()
        return [self.files[i] if self.files else f"image {i}" for i in index]

    @cached_property
    def _listing(self) -> str:
        """A checksum of the training images' names, below the folder that holds them all."""
        common = os.path.commonpath([os.path.dirname(name) for name in self.files]) if self.files else ""
        names = "\n".join(name[len(common) :].lstrip(os.sep) for name in self.files)
        return hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def save(self) -> None:
        """Write a checkpoint, unless the weights are not finite; the first process does.

        Raises:
            NotFinite: they are not; the checkpoints before stay as they are.
            OSError: it cannot be written; the same.
        """
        for name, value in self.model.state_dict().items():
            if not value.isfinite().all():
                raise NotFinite(f"{name} is not finite", self.done)
        if not self.processes.is_first:
            return
        state = {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "step": self.done,
            "images": self.train.count,
            "files": self._listing,
            "config": self.config.to_yaml(),
        }
        checkpoint.save(self.out / checkpoint.FOLDER, self.done, state)

    def rate(self, result: Validation) -> None:
        """Say what the checkpoint of this step is worth; the first process does. Raises OSError."""
        if self.processes.is_first:
            checkpoint.rate(self.out / checkpoint.FOLDER, self.done, result.elbo)

    def restore(self) -> None:
        """Go back to the newest checkpoint of the run folder.

        Raises:
            FileNotFoundError, ValueError: there is none, it is damaged, or the data have changed.
        """
        # Each part takes its tensors to where it needs them; Adagrad counts on the host, even on a GPU.
        state = checkpoint.load_newest(self.out / checkpoint.FOLDER, torch.device("cpu"))
        try:
            self._check_data(state)
            self._load(state)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:  # another version's, or made up
            raise ValueError(f"{self.out}: its newest checkpoint is not of such a run: {error}") from None
        if (then := state.get("versions")) not in (None, now := checkpoint.versions()):
            print(f"trained so far with {then}, now {now}: not the same bits as in one go", flush=True)
        if self.done > self.steps:
            raise ValueError(
                f"{self.out} is at step {self.done} already, beyond the {self.steps} asked for: "
                "raise --epochs or --max-steps"
            )

    def _check_data(self, state: dict[str, Any]) -> None:
        if state["images"] != self.train.count:
            raise ValueError(
                f"{self.out} was trained on {state['images']} images, the data now hold "
                f"{self.train.count}: the run cannot go on as it would have"
            )
        if state.get("files", self._listing) != self._listing:
            raise ValueError(
                f"{self.out} was trained on images of other names, or in another order: the run cannot go on "
                "as it would have"
            )

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # this device's and this command's, not the checkpoint's
        if state["scaler"]:  # that of a run without float16 is empty
            self.step.scaler.load_state_dict(state["scaler"])
        self.done = state["step"]
        self.step.restore(self.done)
        self.step.set_lr(self.lr(self.done + 1))

    def leave(self) -> None:
        """Part from the other processes; nothing trains afterwards."""
        self.step.release()  # NCCL waits for the end of every graph that uses its connections
        self.processes.leave()


def _check_writable(out: Path) -> None:
    """Raise now what would otherwise end the run after the data have been decoded."""
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file: name another run folder with --out")
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"some")
    except OSError as error:
        text = f"{error.strerror}: name another run folder with --out, or mend that"
        raise OSError(error.errno, text, str(nearest)) from None


def prepare(arguments: Arguments) -> Run:
    """Open the data, build the parts, make the run folder or restore its newest checkpoint.

    Raises:
        ValueError, FileNotFoundError, OSError: the run cannot be what was asked for.
        CompileFailed, CaptureFailed: this machine cannot compile or capture the step.
    """
    config, training = arguments.settings, arguments.settings.training
    device = choose_device(arguments.device)
    processes = join(device)
    if device.type == "cuda":  # this process's, in every thread and for every library
        device = torch.device("cuda", torch.cuda.current_device())
    out = processes.first_says(arguments.resume or arguments.out or free_run_folder(config))
    if out.exists() and not arguments.resume:
        raise FileExistsError(
            f"{out} exists: name another folder with --out, or continue with --resume {out}"
        )
    _check_writable(out)
    if arguments.resume:
        _check_writable(out / checkpoint.FOLDER)
    share = _share(training, processes)
    if processes.world > 1:
        if processes.local_rank == 0:
            find(config.data)  # draws the faces if need be
        processes.wait()
    train, valid, bad, files = open_data(
        config.data, share, training.seed, device, processes.rank, processes.world
    )
    given, config = config, config.resolve(len(train))
    if config.data.root:  # a checkpoint may be resumed from another folder
        config = replace(config, data=replace(config.data, root=config.data.root.resolve()))

    torch.manual_seed(training.seed)  # all processes begin with the same weights
    torch.backends.cudnn.benchmark = not training.deterministic  # every step has the same shapes
    torch.use_deterministic_algorithms(training.deterministic)
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS demands
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    launch.ENABLED = training.fused
    model = build(config).to(device)
    model.to(memory_format=torch.channels_last)  # what tensor cores want; faster on a CPU too
    loss = build_loss(config.objective).to(device)
    dtype, precision = autocast_dtype(device, training.amp)
    compiled, execution = compiles(device, training.compile)
    step = TrainingStep(
        model,
        loss,
        build_optimizer(training, model.parameters()),
        seed=training.seed,
        dtype=dtype,
        compile=compiled,
        history=min(training.log_every, training.steps(len(train))),
        clip_grad=training.clip_grad,
        accumulate=training.accumulate,
        processes=processes,
    )
    run = Run(config, out, model, loss, step.optimizer, step, train, valid, files, processes)
    if arguments.resume:
        run.restore()
    captured, how = captures(device, training)
    if run.done < run.steps and (compiled or device.type == "cuda"):
        compiler.remove_truncated()
        images = train if captured and isinstance(train, Resident) else train.head(train.batch_size)
        begin = partial(step.capture if captured else step.rehearse, images)
        fits = compiler.first_step(begin, step.recompile, compile=compiled)
        if captured:
            how = "captured" if fits else "not captured: the graph does not fit the GPU's memory"
        if compiled and not step.compile:
            execution = "eager (torch.compile failed)"
    processes.wait()  # nobody writes before all are ready
    if processes.is_first and not arguments.debug_nan:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(out / "config.yaml", given.to_yaml())
        if bad:
            checkpoint.write_text(out / "bad_files.txt", "".join(f"{file}\t{text}\n" for file, text in bad))
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    if processes.world > 1:
        where = f"{processes.world} processes, {train.batch_size} images each a step; {where}"
    print(
        f"{train.count} training and {valid.count} validation images; {where}; {precision}; "
        f"{execution}{how and ', ' + how}; steps {run.done} to {run.steps}; run folder {out}",
        flush=True,
    )
    return run


def _share(training: TrainingConfig, processes: Processes) -> int:
    """The images of a batch that each process takes."""
    parts = processes.world * training.accumulate
    if training.batch_size % parts or training.batch_size < 2 * parts:
        raise ValueError(
            f"--batch-size {training.batch_size} cannot be cut into {parts} equal parts of at least 2 images "
            f"({processes.world} processes x --accumulate {training.accumulate})"
        )
    return training.batch_size // processes.world
