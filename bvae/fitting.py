"""Train from Python: `bvae.fit` on arrays, tensors, folders and Datasets."""

import dataclasses
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bvae import config as configuration
from bvae.config import SIZES, Config
from bvae.datasets import Data, open_images
from bvae.errors import UsageError
from bvae.losses import BetaLoss, CapacityLoss
from bvae.model import BetaVAE
from bvae.paths import expand, expand_options
from bvae.pipelines.arrays import collect
from bvae.training import results
from bvae.training.claim import claim
from bvae.training.distributed import Distributed
from bvae.training.loop import train
from bvae.training.monitor import Callback, Monitor
from bvae.training.setup import OpenData, connect, prepare, switches
from bvae.training.signals import StopRequest
from bvae.training.validation import Validation

HELD_OUT = 10  # every tenth image is for validation, unless `valid` is given

_running = threading.Lock()


class Fitted(NamedTuple):
    """What `fit` returns."""

    model: BetaVAE  # in evaluation mode, on the device that trained it
    config: Config  # everything that the run depends on, resolved to numbers
    history: list[dict[str, Any]]  # the log: records of training and validation, in order
    validation: Validation | None  # the last one; None if Ctrl-C stopped the run


def fit(
    images: Any,
    preset_or_config: str | Path | Config | None = None,
    *,
    valid: Any = None,
    model: BetaVAE | None = None,
    loss: nn.Module | None = None,
    out: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    **overrides: Any,
) -> Fitted:
    """Train a beta-VAE on images; the same run as `python -m bvae.train`, bit for bit.

    Args:
        images: a uint8 array or tensor `[N, H, W, C]`, `[N, C, H, W]` or `[N, H, W]` (grey), or one of
            floating point in [0, 1]; a folder of image files; or a Dataset (torch's or Hugging Face's) of
            images, or of tuples or mappings that hold one. C is 1 or 3. Equal squares of 32 to 256 pixels
            keep their size; others are cropped to a square and resized to `image_size` (64).
        preset_or_config: a preset's name, a YAML file or a `Config`. None: the preset `small` on a CPU, the
            defaults of `python -m bvae.train` on a GPU.
        valid: images to validate on, as `images`. None: every tenth of `images`, not trained on.
        model: a model to train in place, instead of a new one.
        loss: a module called as `loss(raw, target, kl)` that returns `LossTerms`, in place of the
            configuration's: raw is the decoder's output before the activation `[B, C, H, W]`, target uint8 of
            that shape, and kl `[B]` in nats.
        out: the run folder to create. None: nothing is written to disk.
        callbacks: objects with some of the methods of `bvae.training.monitor.Callback`.
        overrides: options of `python -m bvae.train`, with underscores: `lr=1e-3, max_steps=2000, amp=True`.
            `device` is "auto", "cpu" or "cuda".

    Returns:
        The trained model, the resolved configuration, the log and the last validation.

    Raises:
        UsageError: images, options or a folder that cannot be used, or a `fit` inside a running `fit`.
        NotFinite: the loss is NaN or infinite; the message names the step.

    Ctrl-C stops the run after the step, and `fit` returns the results so far. If a callback raises an
    exception, `fit` raises it; the steps before it are in a checkpoint, if there is a run folder and a
    single process.

    Example:
        >>> import torch
        >>> from bvae import fit
        >>> images = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8)
        >>> tiny = {"hidden_dims": (4, 8), "latent_dim": 2, "batch_size": 8, "max_steps": 3}
        >>> fitted = fit(images, **tiny)  # doctest: +ELLIPSIS
        36 training and 4 validation images; ...
        >>> fitted.model.sample(5).shape
        torch.Size([5, 3, 32, 32])
    """
    with _only_one_fit():
        config, device_name = _configure(images, preset_or_config, model, overrides)
        opened: OpenData | None = None
        if not isinstance(images, str | Path):
            fixed = model is not None or isinstance(preset_or_config, Config)
            size = config.data.image_size if fixed or "image_size" in overrides else None
            channels = config.data.channels if fixed or "channels" in overrides else None
            train_on, held_out = _collect(images, valid, config, size, channels)
            config = _with_image_options(config, train_on)
            opened = partial(_open, train_on, held_out)
        elif valid is not None:
            raise UsageError("valid needs images in memory; of a folder, every tenth image is for validation")
        if loss is not None:
            _check_loss(loss, config)
        folder = expand(out) if out is not None else None
        if folder and folder.exists():
            raise UsageError(f"out: {folder} exists, and fit starts a new run: name another folder")
        _check_callbacks(callbacks)
        device, distributed = connect(device_name)
        with ExitStack() as stack:
            if folder:
                folder = stack.enter_context(claim(folder, "", distributed))
            stack.enter_context(switches(config.training, device))
            stop = stack.enter_context(StopRequest((signal.SIGINT,)))
            run = prepare(config, folder, device, distributed, data=opened, model=model, loss=loss)
            with Monitor(run, callbacks) as monitor:
                validation = train(run, monitor, stop)
            if validation and run.out and distributed.is_main:
                results.write(run, validation)
            monitor.end(validation)
            run.close()
        return Fitted(run.model.eval(), run.config, monitor.history, validation)


@contextmanager
def _only_one_fit() -> Iterator[None]:
    """Raise UsageError inside a running `fit`: a run sets switches of the whole process."""
    if not _running.acquire(blocking=False):
        raise UsageError(
            "fit is already running in this process: start this one after it, or in another process"
        )
    try:
        yield
    finally:
        _running.release()


def _configure(
    images: Any, base: str | Path | Config | None, model: BetaVAE | None, overrides: Mapping[str, Any]
) -> tuple[Config, str]:
    """The configuration, and the name of the device."""
    options = dict(overrides)
    device = options.pop("device", "auto")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu or cuda, got {device!r}")
    if base is None:
        base = configuration.default_preset("folder", device)
    config = base if isinstance(base, Config) else configuration.read(base)[0] if base else Config()
    if isinstance(images, str | Path):
        options = {"data": "folder", "data_root": str(images), **options}
    elif refused := {"data", "data_root", "stream"} & options.keys():
        raise UsageError(f"{', '.join(sorted(refused))}: the images are given already, leave this out")
    if model is not None:
        options = {**options, **_architecture(model)}
    config = configuration.override(expand_options(config), options)
    config.check()
    return config, device


def _architecture(model: BetaVAE) -> dict[str, Any]:
    """The options that follow from a model."""
    if not isinstance(model, BetaVAE):
        raise UsageError(
            f"model must be a BetaVAE, got {type(model).__name__}: register your network with "
            "bvae.register_architecture, and pass BetaVAE(arch=its name)"
        )
    names = ("arch", "latent_dim", "hidden_dims", "image_size")
    likelihood = "gaussian" if model.activation == "tanh" else "bernoulli"
    return {
        **{name: model.config[name] for name in names},
        "channels": model.config["in_channels"],
        "likelihood": likelihood,
    }


def _check_loss(loss: nn.Module, config: Config) -> None:
    """Raise UsageError for a loss that cannot go with the model; give one of ours its M/N as a number."""
    if not isinstance(loss, nn.Module):
        raise UsageError(f"loss must be a torch module that returns LossTerms, got {loss!r}")
    if not isinstance(loss, BetaLoss | CapacityLoss):
        return
    likelihood = config.objective.likelihood
    wanted = (likelihood, "tanh" if likelihood == "gaussian" else None)
    if (loss.likelihood, loss.activation) != wanted:
        raise UsageError(
            f"loss must have likelihood={wanted[0]!r} and activation={wanted[1]!r} for this model, got "
            f"{loss.likelihood!r} and {loss.activation!r}"
        )
    if loss.reduction == "none" or isinstance(loss.decoder_variance, (str, Tensor)):
        raise UsageError(
            "loss must have a reduction of 'mean' or 'sum' and a number as decoder_variance, from which the "
            f"log computes the MSE per pixel; got {loss.reduction!r} and {loss.decoder_variance!r}"
        )
    if isinstance(loss.kl_weight, str):  # "m_over_n"
        loss.kl_weight = config.model.latent_dim / config.data.image_size**2


def _check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raise UsageError for a callback that nothing would ever call."""
    known = [name for name in vars(Callback) if name.startswith("on_")]
    if not isinstance(callbacks, Sequence):
        raise UsageError(
            f"callbacks must be a list of objects, got {type(callbacks).__name__}: give [callback]"
        )
    for callback in callbacks:
        names = [name for name in dir(callback) if name.startswith("on_")]
        if isinstance(callback, type) or not set(names) & set(known) or set(names) - set(known):
            raise UsageError(
                f"callbacks: {callback!r} must be an object with some of {', '.join(known)} and no other on_"
            )


def _collect(
    images: Any, valid: Any, config: Config, size: int | None, channels: int | None
) -> tuple[Tensor, Tensor]:
    """Training and validation images, uint8 [N, S, S, C]; size or channels None: those of the images."""
    data = config.data
    pixels = collect(images, size, channels, data.crop)
    height, width, channels = pixels.shape[1:]
    if height != width or not SIZES[0] <= height <= SIZES[1]:
        print(f"images of {height} x {width} pixels: cropped to squares, resized to {data.image_size} pixels")
        pixels = collect(pixels, data.image_size, channels, data.crop)
    if valid is not None:
        return pixels, collect(valid, pixels.shape[1], channels, data.crop, "valid")
    if len(pixels) < 3:
        raise UsageError(
            f"images holds {len(pixels)} images: at least 3 are needed, one of them for validation"
        )
    held_out = torch.arange(len(pixels)) % HELD_OUT == 0
    return pixels[~held_out], pixels[held_out]


def _with_image_options(config: Config, images: Tensor) -> Config:
    """The configuration with the images' size and channels."""
    channels: Literal[1, 3] = 1 if images.shape[3] == 1 else 3
    data = dataclasses.replace(config.data, name="memory", image_size=images.shape[1], channels=channels)
    config = dataclasses.replace(config, data=data)
    config.check()
    return config


def _open(
    train_on: Tensor,
    held_out: Tensor,
    config: Config,
    batch_size: int,
    device: torch.device,
    distributed: Distributed,
) -> Data:
    """The images as `prepare` needs them."""
    training, ranks = config.training, (distributed.rank, distributed.world_size)
    images = train_on, held_out, config.data
    return open_images(*images, batch_size, training.seed, device, *ranks, training.accumulate)
