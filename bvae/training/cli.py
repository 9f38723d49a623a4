"""The command line of `python -m bvae.train`."""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeVar, get_args

import tyro

from bvae import config as configuration
from bvae.config import Config, LossType
from bvae.errors import MissingError, UsageError
from bvae.paths import expand, expand_options
from bvae.yaml_file import parse_mapping

if TYPE_CHECKING:
    from torch import Tensor

# What a resumed run may change: folders, length, the options that help against NaN losses, and how the same
# step is executed.
MAY_CHANGE = (
    *("root", "cache_dir", "epochs", "max_steps", "log_every", "checkpoint_every"),
    *("lr", "muon_lr", "schedule", "lr_gamma", "warmup"),
    *("compile", "capture", "fused"),
)


AUTO = Path("auto")  # --resume auto
LONGEST = 1 << 16  # characters of a configuration in a checkpoint; YAML takes seconds to read more
WORKED_OUT = (None, "auto", "m_over_n")  # values for which a checkpoint has numbers


class _Checked(Protocol):
    def check(self) -> None:
        """Raise UsageError for a value out of its range."""


C = TypeVar("C", bound=_Checked)


@dataclass(frozen=True)
class Arguments:
    """This command, and the run's configuration."""

    config: Path | None = None
    """A YAML file, ours or PyTorch-VAE's, or a preset's name; further options override it. A run's own
    config.yaml repeats that run."""
    resume: Path | None = None
    """Run folder to continue. auto: continue in --out if it holds a checkpoint, else start there, so that
    one command serves a job that its scheduler starts again."""
    out: Path | None = None
    """Run folder to create. None: the first free runs/<data>-<loss>-<number>."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    module: Annotated[str | None, tyro.conf.arg(name="import")] = None
    """A Python module to import first: one that calls bvae.register_architecture."""
    accept_changed_images: bool = False
    """With --resume: continue although images have other pixels than at the checkpoint, under their names."""
    log: Literal["wandb", "mlflow"] | None = None
    """Log to Weights & Biases or MLflow too. A resumed run continues there in its old run."""
    profile: bool = False
    """Record 20 of the first steps: a Chrome trace in the run folder, and a table of each part's share."""
    debug_nan: bool = False
    """With --resume, after a loss or a gradient was NaN or infinite: continue from the last good checkpoint
    in eager mode, name the first module that produces such a number, and write nothing."""
    settings: Config = field(default_factory=Config)


def parse(argv: list[str], description: str) -> Arguments:
    """Parse the command line, with defaults from --config, --resume or the device.

    Raises:
        ValueError, FileNotFoundError: a configuration that cannot be used.
        SystemExit: --help, or options that cannot be read (status 2).
    """
    early_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (
        "--config",
        "--resume",
        "--data",
        "--device",
        "--loss-type",
        "--import",
        "--epochs",
        "--max-steps",
    ):
        early_parser.add_argument(name, nargs="?")
    early, _ = early_parser.parse_known_args(argv)
    if early.loss_type not in (None, *get_args(LossType)):
        known = ", ".join(get_args(LossType))
        raise UsageError(f"Undefined loss type. --loss-type must be one of {known}, got {early.loss_type}")
    if module := getattr(early, "import"):
        from bvae.architectures import import_module

        import_module(module)
    base, out, device = Config(), None, None
    notes: list[str] = []  # printed when the command line has been checked
    resume = expand(early.resume) if early.resume and early.resume != str(AUTO) else None
    if resume and early.config:
        raise UsageError("--resume continues with the run's own configuration: remove --config")
    if resume:
        base = _checkpointed(resume)
    elif early.config is not None:
        base, unused, out, device = configuration.read(early.config)
        if unused:
            notes.append(f"{early.config}: no counterpart here, not used: {', '.join(unused)}")
    elif preset := configuration.default_preset(early.data or "faces", early.device or "auto"):
        base = configuration.read(preset)[0]
        notes.append(f"options that are not on the command line come from the preset {preset}")
        description += f"\nThe defaults below are those of the preset {preset}. "
    if early.epochs and not early.max_steps:
        base = dataclasses.replace(base, training=dataclasses.replace(base.training, max_steps=None))
    description += "Options before --help change the defaults that it shows: --data folder --help."

    arguments = tyro.cli(
        Arguments,
        args=argv,
        default=Arguments(out=out, device=device or "auto", settings=base),
        description=description,
        prog="python -m bvae.train",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    arguments = expand_options(arguments)
    arguments.settings.check()
    if arguments.debug_nan:
        if not resume:
            raise UsageError("--debug-nan needs --resume and the folder of the run to examine")
        eager = dataclasses.replace(arguments.settings.training, compile=False, capture=False)
        settings = dataclasses.replace(arguments.settings, training=eager)
        arguments = dataclasses.replace(arguments, settings=settings)
    if resume:
        arguments = _with_kernels_of(base, arguments)
        _check_resumable(base, arguments)
    elif arguments.resume == AUTO:
        arguments = _resume_or_start(arguments)
    for note in notes:
        print(note)
    return arguments


def _checkpointed(run: Path) -> Config:
    """The configuration of a run, from its newest checkpoint."""
    if not (run / "config.yaml").is_file():
        raise MissingError(f"{run} is not a run folder: it holds no config.yaml")
    from bvae.model import expected_weights

    return read_checkpointed(run, Config, expected_weights)


def read_checkpointed(run: Path, kind: type[C], expected: "Callable[[C], dict[str, Tensor]]") -> C:
    """The configuration in a run's newest checkpoint, whose model is compared with it.

    Args:
        kind: the configuration's dataclass.
        expected: the weights, on `meta`, of the model that a configuration describes.

    Raises:
        UsageError: the folder holds no checkpoint of this kind, or damaged ones.
        OSError: it cannot be read.
    """
    import torch

    from bvae.training import checkpoint
    from bvae.weights import difference

    state = checkpoint.load_newest(run / checkpoint.FOLDER, torch.device("cpu"))
    with checkpoint.of_another_kind(run):
        text, model = state.get("config"), state.get("model")
        if not isinstance(text, str) or len(text) > LONGEST or not isinstance(model, dict):
            raise UsageError("it holds no configuration, or no model")
        config: C = configuration.from_mapping(kind, parse_mapping(text))
        config.check()
        # Now, before the data are decoded, and before memory is taken for a model of that size.
        if reason := difference(model, expected(config)):
            raise UsageError(f"the model: {reason}")
    return config


def _resume_or_start(arguments: Arguments) -> Arguments:
    """The arguments for --resume auto: those of --resume if there is a checkpoint.

    The checkpoint's configuration has numbers for what this command may leave open.
    """
    out = arguments.out
    if out is None:
        raise UsageError("--resume auto needs --out: the folder that is the same each time")
    from bvae.training import checkpoint

    if not checkpoint.checkpoints(out / checkpoint.FOLDER):
        return arguments
    base = _checkpointed(out)
    settings = base
    for section in ("data", "model", "objective", "training"):
        wanted, old = (getattr(config, section) for config in (arguments.settings, base))
        kept = {
            key: value
            for key, value in vars(old).items()
            if getattr(wanted, key) in WORKED_OUT or (key == "batch_size" and getattr(wanted, key) > value)
        }  # a batch is smaller if there are fewer images
        kept = {key: value for key, value in kept.items() if key not in MAY_CHANGE}
        settings = dataclasses.replace(settings, **{section: dataclasses.replace(wanted, **kept)})
    wanted_size, size = (config.training.batch_size for config in (arguments.settings, settings))
    if wanted_size != size:
        print(f"--batch-size {wanted_size} is not used: {out} continues with its batch size of {size}")
    arguments = dataclasses.replace(arguments, resume=out, out=None, settings=settings)
    arguments = _with_kernels_of(base, arguments)
    _check_resumable(base, arguments)
    return arguments


def _with_kernels_of(base: Config, arguments: Arguments) -> Arguments:
    """The arguments with the network's kernels of the checkpoint: others would round differently."""
    settings, kept = arguments.settings, base.training.network_kernels
    wanted = settings.training.network_kernels
    if wanted not in (kept, "auto"):
        print(f"--network-kernels {wanted} is not used: {arguments.resume} continues with {kept}")
    training = dataclasses.replace(settings.training, network_kernels=kept)
    return dataclasses.replace(arguments, settings=dataclasses.replace(settings, training=training))


def _check_resumable(base: Config, arguments: Arguments) -> None:
    if arguments.out:
        raise UsageError("--resume continues in the run's own folder: remove --out")
    for section in ("data", "model", "objective", "training"):
        old, new = (dataclasses.asdict(getattr(c, section)) for c in (base, arguments.settings))
        for key, value in new.items():
            if value != old[key] and key not in MAY_CHANGE:
                raise UsageError(f"--resume cannot change {section}.{key} from {old[key]} to {value}")
