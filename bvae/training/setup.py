"""Set up a run from a configuration: open the data, build the parts, start or resume."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bvae import files
from bvae.arguments import LEAST_BATCH
from bvae.config import Config, NetworkKernels, ObjectiveConfig, TrainingConfig
from bvae.datasets import Data, find_files, open_data
from bvae.device import choose_device
from bvae.errors import UsageError
from bvae.kernels import launch
from bvae.kernels.cpu import library
from bvae.losses import BetaLoss, CapacityLoss
from bvae.model import BetaVAE, build
from bvae.penalties import Covariance, Discriminator, Penalty, TotalCorrelation
from bvae.pipelines.memory_loaders import DeviceLoader
from bvae.training import compiler, completion, malloc, network_kernels
from bvae.training.claim import claim
from bvae.training.cli import AUTO, Arguments
from bvae.training.distributed import Distributed, init_distributed
from bvae.training.optimizer import build_discriminator_optimizer, build_optimizer
from bvae.training.restore import restore
from bvae.training.run import Run
from bvae.training.step import TrainingStep, autocast_dtype, captures, compiles, load_cpu_layers

FEW_STEPS = 1500  # a shorter run, if its length is given in epochs, gets a warning

OpenData = Callable[[Config, int, torch.device, Distributed], Data]  # the int: images per rank and step


# --- The process ------------------------------------------------------------------------------------------
def connect(name: str) -> tuple[torch.device, Distributed]:
    """This process's device, and its place in the job."""
    device = choose_device(name)
    distributed = init_distributed(device)
    if device.type == "cuda":  # the index too, for other threads and libraries
        device = torch.device("cuda", torch.cuda.current_device())
    return device, distributed


@contextlib.contextmanager
def switches(training: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Set the process's switches and generators for a run; restore all of them afterwards."""
    deterministic: Any = torch.utils.deterministic  # type: ignore[attr-defined]
    before = (
        launch.ENABLED,
        launch.NETWORK,
        library.loaded,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []))
        if device.type == "cpu":
            stack.enter_context(malloc.kept())
        try:
            torch.manual_seed(training.seed)  # all ranks start with the same weights
            torch.backends.cudnn.benchmark = not training.deterministic  # every step has the same shapes
            torch.use_deterministic_algorithms(training.deterministic)
            if training.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
                deterministic.fill_uninitialized_memory = False
            launch.ENABLED = training.fused
            launch.NETWORK = training.network_kernels == "ours"
            library.loaded = load_cpu_layers(training, device)
            yield
        finally:
            launch.ENABLED, launch.NETWORK, library.loaded = before[:3]
            torch.backends.cudnn.benchmark = before[3]
            torch.use_deterministic_algorithms(before[4], warn_only=before[5])
            deterministic.fill_uninitialized_memory = before[6]


# --- The run ----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def open_run(arguments: Arguments) -> Iterator[Run]:
    """The run that a command line describes, with the process's switches set for it. Raises as `prepare`."""
    config, restart = arguments.settings, arguments.resume == AUTO
    device, distributed = connect(arguments.device)
    out = None if restart or not arguments.resume else arguments.resume
    resume = out is not None
    write = not arguments.debug_nan
    name = f"{config.data.name}-{config.objective.loss_type}"
    with contextlib.ExitStack() as stack:
        out = out or arguments.out
        if write:
            out = stack.enter_context(claim(out, name, distributed, resume=resume, restart=restart))
        stack.enter_context(switches(config.training, device))
        changed = arguments.accept_changed_images
        places = config, out, device, distributed
        yield prepare(*places, resume=resume, write=write, accept_changed_images=changed)


def prepare(
    config: Config,
    out: Path | None,
    device: torch.device,
    distributed: Distributed,
    *,
    resume: bool = False,
    write: bool = True,
    accept_changed_images: bool = False,
    data: OpenData | None = None,
    model: BetaVAE | None = None,
    loss: nn.Module | None = None,
) -> Run:
    """Open the data, build the parts, and write the run's configuration or restore its newest checkpoint.

    Call it inside `claim` and `switches`.

    Args:
        config: not yet resolved.
        out: the run folder. None: nothing is written.
        resume: continue from the folder's newest checkpoint.
        write: False changes nothing in the folder.
        accept_changed_images: see `restore`.
        data: opens the images, in place of those of the configuration.
        model, loss: in place of those of the configuration.

    Raises:
        UsageError, OSError: the run cannot be set up as requested.
        CompileFailed, CaptureFailed: this machine cannot compile or capture the step.
    """
    opened = _open(config, device, distributed, data or _configured)
    run = _build(config, out, device, distributed, opened, model, loss)
    if resume:
        restore(run, accept_changed_images)
    execution = _compile_and_capture(run)
    distributed.barrier()  # write only when all ranks are ready
    if out and write and distributed.is_main:
        completion.unmark(out)
        repeated = _with_network_kernels(config, run.config.training.network_kernels)
        files.write_text(out / "config.yaml", _with_absolute_paths(repeated).to_yaml())
        run.model.save_config(out)
        if opened.bad:
            lines = "".join(f"{files.one_line(file)}\t{text}\n" for file, text in opened.bad)
            files.write_text(out / "bad_files.txt", lines)
    _announce(run, execution)
    return run


def _with_absolute_paths(config: Config) -> Config:
    """The same configuration for use from another folder."""
    data = config.data
    root, cache_dir = (path and path.absolute() for path in (data.root, data.cache_dir))
    return replace(config, data=replace(data, root=root, cache_dir=cache_dir))


def _open(config: Config, device: torch.device, distributed: Distributed, data: OpenData) -> Data:
    training = config.training
    parts = distributed.world_size * training.accumulate
    if training.batch_size % parts or training.batch_size < 2 * parts:
        raise UsageError(
            f"--batch-size {training.batch_size} cannot be cut into {parts} equal parts of at least 2 images "
            f"({distributed.world_size} processes x --accumulate {training.accumulate})"
        )
    _check_batch(config, training.batch_size // parts)
    return data(config, training.batch_size // distributed.world_size, device, distributed)


def _check_batch(config: Config, images: int) -> None:
    """Raise UsageError if one part of a rank's batch has too few images for the objective."""
    if config.objective.loss_type == "TC" and images < LEAST_BATCH:
        raise UsageError(
            "--loss-type TC estimates the total correlation from the images of each process and each part "
            f"of --accumulate, at least {LEAST_BATCH} of them, got {images}: raise --batch-size"
        )


def _configured(config: Config, batch_size: int, device: torch.device, distributed: Distributed) -> Data:
    """The images that the configuration names."""
    if distributed.world_size > 1:
        if distributed.local_rank == 0:
            find_files(config.data)  # draws the faces if needed
        distributed.barrier()
    seed, rank, world_size = config.training.seed, distributed.rank, distributed.world_size
    accumulate = config.training.accumulate
    return open_data(config.data, batch_size, seed, device, rank, world_size, accumulate)


def _build(
    config: Config,
    out: Path | None,
    device: torch.device,
    distributed: Distributed,
    data: Data,
    model: BetaVAE | None,
    loss: nn.Module | None,
) -> Run:
    """All parts, untrained, on the device."""
    _check_batch(config, data.train.batch_size // config.training.accumulate)
    batch_size = data.train.batch_size * distributed.world_size
    if batch_size != config.training.batch_size:
        print(f"{data.train.count} training images: the batch size is {batch_size}", flush=True)
        config = replace(config, training=replace(config.training, batch_size=batch_size))
    config = config.resolve(len(data.train))
    config = _with_absolute_paths(config)
    training = config.training

    # channels_last suits tensor cores, and is faster on a CPU too.
    model = (model or build(config)).to(device).to(memory_format=torch.channels_last).train()
    module = (loss or build_loss(config.objective)).to(device)
    penalty = None if loss else build_penalty(config, data.train.count)
    adversary = None
    if isinstance(penalty, Discriminator):
        adversary = build_discriminator_optimizer(training, penalty.to(device).parameters())
    step = TrainingStep(
        model,
        module,
        build_optimizer(training, [*model.parameters(), *module.parameters()]),
        seed=training.seed,
        dtype=autocast_dtype(device, training.amp)[0],
        compile=compiles(device, training.compile)[0],
        buffer_steps=min(training.log_every, training.steps(len(data.train))),
        penalty=penalty,
        discriminator_optimizer=adversary,
        clip_grad=training.clip_grad,
        accumulate=training.accumulate,
        distributed=distributed,
    )
    parts = config, out, model, module, step.optimizer, step, data.train, data.valid, data.files, distributed
    return Run(*parts, pixels=data.pixels, decoder=data.decoder, loss_is_given=loss is not None)


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
    return BetaLoss(objective.beta if objective.loss_type == "H" else 1.0, **options)


def build_penalty(config: Config, dataset_size: int) -> Penalty | None:
    """What the objective of a resolved configuration adds to recon + KL.

    Args:
        dataset_size: training images.
    """
    objective = config.objective
    assert objective.kl_weight not in (None, "m_over_n")
    kl_weight = float(objective.kl_weight)
    if objective.loss_type == "TC":
        return TotalCorrelation(dataset_size, weight=kl_weight * (objective.beta - 1))
    if objective.loss_type == "Factor":
        return Discriminator(config.model.latent_dim, weight=kl_weight * objective.gamma)
    if objective.loss_type in ("DIP-I", "DIP-II"):
        assert objective.lambda_d is not None
        weights = objective.lambda_od, objective.lambda_d
        return Covariance(*weights, of_samples=objective.loss_type == "DIP-II", weight=kl_weight)
    return None


def _compile_and_capture(run: Run) -> str:
    """Compile the step and capture it if possible; return a line that says how it is executed.

    Raises:
        CompileFailed, CaptureFailed: not possible on this machine; the message names the option to use.
    """
    step, training = run.step, run.config.training
    execution = compiles(step.device, training.compile)[1]
    captured, how = captures(step.device, training)
    if training.network_kernels == "ours":
        network_kernels.say_shortfall(run)
    if run.done < run.steps and (captured or step.compile or step.device.type == "cuda"):
        compiler.remove_truncated()
        begin: Callable[[], bool | None]
        if captured and isinstance(run.train, DeviceLoader):
            begin = partial(step.capture, run.train)
        else:
            images = run.train.head(run.train.batch_size)
            begin = partial(step.capture if captured else step.compile_and_restore, images)
        compiled = step.compile
        start = partial(compiler.first_step, begin, step.recompile, compile=compiled)
        if captured and training.network_kernels == "auto":
            fits = network_kernels.capture_faster(run, begin, start)
        else:
            fits = start()
        if captured:
            how = "captured" if fits else "not captured: the graph does not fit the GPU's memory"
        if compiled and not step.compile:
            execution = "eager (torch.compile failed)"
    if training.network_kernels == "auto":  # the run and its checkpoints keep what it has become
        run.config = _with_network_kernels(run.config, "ours" if launch.NETWORK else "compiler")
    return ", ".join(filter(None, (execution, how)))


def _with_network_kernels(config: Config, kernels: NetworkKernels) -> Config:
    return replace(config, training=replace(config.training, network_kernels=kernels))


def _announce(run: Run, execution: str) -> None:
    """Print what will be trained, and how."""
    training, device, world_size = run.config.training, run.step.device, run.distributed.world_size
    hardware = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    if world_size > 1:
        hardware = f"{world_size} processes, {run.train.batch_size} images each per step; {hardware}"
    print(
        f"{run.train.count} training and {run.valid.count} validation images; {hardware}; "
        f"{autocast_dtype(device, training.amp)[1]}; {execution}; steps {run.done} to {run.steps}"
        + (f"; run folder {run.out}" if run.out else ""),
        flush=True,
    )
    remedy = "max_steps=5000" if run.config.data.name == "memory" else "--max-steps 5000"
    if run.steps < FEW_STEPS and training.max_steps is None:
        print(
            f"warning: {run.steps} steps are few for a VAE, and its images will be blurred: "
            f"{remedy} trains longer, over as many epochs as needed",
            flush=True,
        )
