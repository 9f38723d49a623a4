"""The configuration and the command line of `python -m bvae.infogan`. No torch: `--help` needs none."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from bvae import config as configuration
from bvae.config import LARGEST, Config, DataConfig
from bvae.errors import MissingError, UsageError
from bvae.paths import expand, expand_options
from bvae.training.cli import read_checkpointed

# What a resumed run may change: folders, length, and how often it writes.
MAY_CHANGE = ("max_steps", "log_every", "checkpoint_every")
DATA_MAY_CHANGE = ("root", "cache_dir")


@dataclass(frozen=True)
class InfoGANConfig:
    """Everything that a run depends on: the content of infogan.yaml."""

    data: DataConfig = field(default_factory=lambda: DataConfig(image_size=32))
    codes: int = 10
    """Categorical codes that Q reads from the generated images."""
    categories: int = 10
    """Values of each code, equally likely."""
    noise: int = 128
    """Dimensions of the generator's noise, N(0, I)."""
    width: int = 32
    """Channels of the layers beside the image; those further in have up to 4 times as many. The paper: 64."""
    batch_size: int = 64
    """Images per step: as many real ones as generated ones."""
    lr: float = 1e-3
    """Learning rate of the generator (Adam). All rates fall to 0 over the run."""
    discriminator_lr: float = 2e-4
    """Learning rate of the discriminator, and of the layers that it shares with Q."""
    code_lr: float = 1e-3
    """Learning rate of Q's own layers."""
    code_weight: float = 1.0
    """Lambda, the weight of the codes' cross-entropy."""
    max_steps: int = 3000
    """Steps in the whole run."""
    seed: int = 1265
    """Everything random is a function of it."""
    log_every: int = 50
    """Steps between two lines of the log. A loss that is NaN or infinite ends the run there."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""

    def check(self) -> None:
        """Raise UsageError for the first value out of its range."""
        Config(data=self.data).check()
        names = ("codes", "categories", "noise", "width", "batch_size", "lr", "code_lr", "max_steps")
        for name in (*names, "discriminator_lr", "code_weight", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            least = 2 if name in ("categories", "batch_size") else 0
            if not (least <= value <= LARGEST and value > 0):
                raise UsageError(f"{name} must be {'2 or more' if least else 'positive'}, got {value}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be 0 to 2^63 - 1, got {self.seed}")

    @property
    def network(self) -> dict[str, Any]:
        """The arguments of `InfoGAN`."""
        return {
            "arch": "infogan",
            "in_channels": self.data.channels,
            "image_size": self.data.image_size,
            "latent_dim": self.codes,
            **{name: getattr(self, name) for name in ("categories", "noise", "width")},
        }

    def to_yaml(self) -> str:
        """YAML of which `configuration.from_mapping` makes this configuration again."""
        return yaml.safe_dump(configuration.plain(dataclasses.asdict(self)), sort_keys=False)


@dataclass(frozen=True)
class Arguments:
    """This command, and the run's configuration."""

    resume: Path | None = None
    """Run folder to continue."""
    out: Path | None = None
    """Run folder to create. None: the first free runs/<data>-InfoGAN-<number>."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    settings: InfoGANConfig = field(default_factory=InfoGANConfig)


def parse(argv: list[str] | None, description: str) -> Arguments:
    """Parse the command line, with defaults from --resume.

    Raises:
        UsageError, OSError: options that cannot be used, or a run that cannot be resumed.
        SystemExit: --help, or options that cannot be read (status 2).
    """
    early_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early_parser.add_argument("--resume", nargs="?")
    resume = early_parser.parse_known_args(argv)[0].resume
    base = checkpointed(expand(resume)) if resume else InfoGANConfig()
    arguments = tyro.cli(
        Arguments,
        args=argv,
        default=Arguments(settings=base),
        description=description,
        prog="python -m bvae.infogan",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    arguments = expand_options(arguments)
    arguments.settings.check()
    if resume:
        if arguments.out:
            raise UsageError("--resume continues in the run's own folder: remove --out")
        _check_unchanged(base.data, arguments.settings.data, DATA_MAY_CHANGE)
        _check_unchanged(base, arguments.settings, (*MAY_CHANGE, "data"))
    return arguments


def _check_unchanged(old: Any, new: Any, but: tuple[str, ...]) -> None:
    for name, value in vars(new).items():
        if value != getattr(old, name) and name not in but:
            raise UsageError(f"--resume cannot change {name} from {getattr(old, name)} to {value}")


def checkpointed(run: Path) -> InfoGANConfig:
    """The configuration of a run, from its newest checkpoint.

    Raises:
        UsageError: the folder holds no checkpoint of an InfoGAN, or damaged ones.
        OSError: it cannot be read.
    """
    if not (run / "infogan.yaml").is_file():
        raise MissingError(f"{run} is not a run folder of an InfoGAN: it holds no infogan.yaml")
    from bvae.infogan_model import InfoGAN
    from bvae.model import expected_state

    return read_checkpointed(run, InfoGANConfig, lambda config: expected_state(InfoGAN, config.network))
