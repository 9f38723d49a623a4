"""The command line of `python -m bvae.train`."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from bvae import config as configuration
from bvae.config import Config

MAY_CHANGE = ("root", "cache_dir", "epochs", "max_steps", "log_every")  # in a resumed run


@dataclass(frozen=True)
class Arguments:
    """This command, and the run's configuration."""

    config: Path | None = None
    """A YAML file, ours or PyTorch-VAE's, or a preset's name; further options override it. A run's own
    config.yaml repeats that run."""
    resume: Path | None = None
    """Run folder to continue."""
    out: Path | None = None
    """Run folder to make. None: the first free runs/<data>-<loss>-<number>."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    settings: Config = field(default_factory=Config)


def parse(argv: list[str], description: str) -> Arguments:
    """The command line over the defaults that --config, --resume or the device bring.

    Raises:
        ValueError, FileNotFoundError: a configuration that cannot be used.
        SystemExit: --help, or options that cannot be read (status 2).
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--resume", "--data", "--device"):
        early.add_argument(name)
    given, _ = early.parse_known_args(argv)
    base, out = Config(), None
    if given.resume and given.config:
        raise ValueError("--resume continues with the run's own configuration: leave --config out")
    if given.resume:
        file = Path(given.resume) / "config.yaml"
        if not file.is_file():
            raise FileNotFoundError(f"{given.resume} is not a run folder: it holds no config.yaml")
        base, _, _ = configuration.read(file)
    elif given.config:
        base, unused, out = configuration.read(given.config)
        if unused:
            print(f"{given.config}: {', '.join(unused)} have no counterpart here and are not used")
    elif given.data in (None, "faces") and choose_device(given.device or "auto").type == "cpu":
        base, _, _ = configuration.read("faces_cpu")
        print("no GPU: using the preset faces_cpu, sized for a CPU (half the seed's widths, 10 latents)")

    arguments = tyro.cli(
        Arguments,
        args=argv,
        default=Arguments(out=out, settings=base),
        description=description,
        prog="python -m bvae.train",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    arguments.settings.check()
    if arguments.resume:
        _check_resumable(base, arguments)
    return arguments


def _check_resumable(base: Config, arguments: Arguments) -> None:
    if arguments.out:
        raise ValueError("--resume continues in the run's own folder: leave --out out")
    for section in ("data", "model", "objective", "training"):
        old, new = (dataclasses.asdict(getattr(c, section)) for c in (base, arguments.settings))
        for key, value in new.items():
            if value != old[key] and key not in MAY_CHANGE:
                raise ValueError(f"--resume cannot change {section}.{key} from {old[key]} to {value}")


def choose_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU (see torch.cuda.is_available())")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
