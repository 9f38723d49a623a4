"""A run's configuration: dataclasses, their YAML, and the checks that come before any work.

tyro turns the dataclasses into the command line (types, help and defaults from one place); PyYAML reads and
writes the files. A file may be ours, or PyTorch-VAE's in either dialect (`compat/pytorch_vae_config.py`).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from bvae.compat.pytorch_vae_config import Translation, brief, is_dialect, translate, unknown_keys
from bvae.device import has_gpu
from bvae.errors import MissingError, UsageError
from bvae.opening import NotRead
from bvae.paths import expand
from bvae.yaml_file import read_mapping

try:
    from tyro.conf import arg
except ModuleNotFoundError:  # only the command line needs the options' names
    arg = dict

# fmt: off
DataName = Literal[
    "faces", "celeba", "folder", "sprites", "dsprites", "rooms", "shapes3d", "mpi3d", "cars3d", "smallnorb",
    "memory",
]
# fmt: on
NetworkKernels = Literal["compiler", "ours", "auto"]
LossType = Literal["VAE", "H", "B", "TC", "Factor", "DIP-I", "DIP-II"]
PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they become pixels."""

    name: Annotated[DataName, arg(name="data")] = "faces"
    """faces: drawn here on first use. celeba: torchvision's or Kaggle's layout, whole or in part.
    folder: any tree of image files, or of tar shards that hold them. sprites: the images of dSprites,
    drawn here. dsprites: your own dsprites_*.npz. rooms: images with 3D Shapes' factors, drawn here.
    shapes3d, mpi3d, cars3d, smallnorb: your own files of them. memory: the images passed to bvae.fit in
    Python."""
    root: Annotated[Path | None, arg(name="data-root")] = None
    """Folder of the images; for dsprites and mpi3d the npz file, for shapes3d the h5 file. None: data/faces,
    for faces only."""
    crop: int | None = None
    """Side of the centred square to crop, in pixels. None: 148 for celeba and faces (in proportion for other
    sizes), the largest square for folder."""
    image_size: int = 64
    """Side of the images that the model sees, 32 to 256 pixels."""
    channels: Literal[1, 3] = 3
    """1: grey, 3: RGB."""
    flip: bool = True
    """Mirror training images at random."""
    decoder: Literal["auto", "dali", "torchvision"] = "auto"
    """The decoder of the files. auto: NVIDIA DALI if it is installed."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do about damaged files. stop: list all of them. skip: train without them; the list is
    bad_files.txt in the run folder."""
    cache_dir: Path | None = None
    """Where decoded images are kept for the next run. None: bvae in the user's cache folder."""
    stream: bool = False
    """Decode the files again in each epoch, without a cache: for data that fit on no disk."""


SHAPES = ("sprites", "dsprites")  # data sets of 2D shapes
CHANNELS = {  # of the data sets with known factors
    **{"sprites": 1, "dsprites": 1, "rooms": 3},
    **{"shapes3d": 3, "mpi3d": 3, "cars3d": 3, "smallnorb": 1},
}
SIZES = (32, 256)  # smallest and largest side of the images, in pixels


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    arch: str = "pytorch-vae"
    """pytorch-vae: BatchNorm and convolutions of hidden_dims. burgess, higgins-fc, locatello: the networks of
    the papers on 2D shapes. Or the name of a network that --import registers."""
    latent_dim: int = 128
    """Dimensions of z."""
    hidden_dims: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Channels of the stages of pytorch-vae's encoder; the decoder runs them backwards."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss. VAE: recon + kl_weight KL. H: recon + beta kl_weight KL (Higgins et al. 2017).
    B: recon + gamma kl_weight |KL - C|, C rising to max_capacity (Burgess et al. 2018). The others are
    recon + kl_weight (KL + penalty): docs/objectives.md."""

    loss_type: LossType = "B"
    """VAE, H (beta), B (capacity), TC (beta-TCVAE), Factor (FactorVAE), DIP-I or DIP-II."""
    beta: float = 4.0
    """Weight of the KL in H, of the total correlation in TC."""
    gamma: float = 10.0
    """Weight of |KL - C| in B, of the total correlation in Factor."""
    max_capacity: float = 25.0
    """Highest C in B, in nats."""
    capacity_iters: int | Literal["auto"] = "auto"
    """Training steps until C is max_capacity. auto: half the run."""
    lambda_od: float = 10.0
    """Weight of the squared covariances of the latents in DIP-I and DIP-II."""
    lambda_d: float | None = None
    """Weight of their variances' squared distances from 1. None: 10 lambda_od in DIP-I, lambda_od in
    DIP-II."""
    recon: Literal["mean", "sum"] = "mean"
    """mean: over pixels (PyTorch-VAE's mean-squared error). sum: over pixels, as in the papers."""
    kl_weight: float | Literal["m_over_n"] | None = None
    """M_N, a factor on the KL. m_over_n: latent dimensions over pixels, M / (H W).
    None: m_over_n with recon mean, 1 with recon sum."""
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"
    """gaussian: squared error, tanh, pixels in [-1, 1]. bernoulli: cross-entropy, sigmoid, pixels
    in [0, 1]."""
    decoder_variance: float = 0.5
    """Variance s of the gaussian likelihood, (x - recon)^2 / (2 s). 0.5 is the plain squared error."""

    @property
    def weight_on_kl(self) -> float:
        """The factor on the KL, or on |KL - C|, of a resolved objective."""
        factor = {"H": self.beta, "B": self.gamma}.get(self.loss_type, 1.0)
        return factor * float(self.kl_weight)  # type: ignore[arg-type]  # resolve() made it a number


@dataclass(frozen=True)
class TrainingConfig:
    """The run: an optimizer and its schedule."""

    batch_size: int = 144
    """Images per step, of all processes together: their number changes neither steps nor learning rate."""
    optimizer: Literal["adam", "muon", "adagrad"] = "adam"
    """muon: for matrices and filters, with Adam for the rest; it learns more per step. adagrad: the beta-VAE
    paper's, for 2D shapes."""
    lr: float = 5e-4
    """Learning rate at the start, of Adam and Adagrad."""
    muon_lr: float = 0.05
    """Learning rate at the start, of the matrices and filters that muon updates."""
    muon_weight_decay: float = 0.5
    """Decoupled: each step of muon shrinks its matrices and filters by muon_lr times this."""
    schedule: Literal["exponential", "linear", "cosine", "constant"] = "exponential"
    """The learning rates over the run. exponential: times lr_gamma after each epoch. linear, cosine: to 0 at
    the end."""
    lr_gamma: float = 0.95
    """Factor on the learning rates after each epoch of the schedule exponential."""
    discriminator_lr: float = 1e-4
    """Learning rate of the discriminator of the loss Factor, throughout the run."""
    warmup: int = 0
    """Steps in which the learning rates first rise from 0, on a line."""
    weight_decay: float = 0.0
    """L2 penalty, of Adam and Adagrad."""
    epochs: int = 50
    """Passes over the training images. Given alone, they replace the max_steps of a preset or file."""
    max_steps: int | None = None
    """Train for this many steps, over as many epochs as needed. None: for `epochs`."""
    seed: int = 1265
    """Everything random is a function of it: weights, order, flips, noise."""
    amp: bool = False
    """Mixed precision: bfloat16 where the device has it, else float16 with a scaler on a GPU. A CPU without
    bfloat16 arithmetic stays in float32 (autocast would be 15 times slower there)."""
    compile: bool = True
    """torch.compile. It takes about a minute at the start, and pays off in runs of more than some minutes."""
    capture: bool = True
    """On a GPU: the whole step as one CUDA graph."""
    fused: bool = True
    """On a GPU: the Triton kernels for sample, KL and loss; on a CPU: the layers in C++. PyTorch's
    operations otherwise."""
    network_kernels: NetworkKernels = "compiler"
    """On a GPU: what trains BatchNorm with LeakyReLU, and the decoder's last block. compiler: what
    torch.compile makes. ours: Triton kernels, where they can take a layer. auto: ours if they make the
    captured step 2% faster, timed at the first start. The default is compiler until a GPU has raced them."""
    deterministic: bool = False
    """On a GPU: only operations that give the same bits each time, which are slower. A CPU always does so."""
    clip_grad: float | None = None
    """Largest norm of the gradient. None: no limit."""
    accumulate: int = 1
    """Equal parts of a batch that go through the network one after the other, to save memory. BatchNorm and
    |KL - C| use one part at a time."""
    log_every: int = 50
    """Steps between two lines of the log. A loss that is NaN or infinite ends the run there."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints, each with a validation. None: after each epoch, but at most every 10
    seconds."""

    def steps(self, steps_per_epoch: int) -> int:
        """Steps in the whole run."""
        return self.max_steps or self.epochs * steps_per_epoch


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on: the content of `config.yaml`."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def check(self) -> None:
        """Raise ValueError for the first value out of its range, or that does not go with others."""
        self.check_ranges({})
        data = self.data
        from bvae.architectures import STAGES, check_size  # imports torch

        check_size(self.model.arch, data.image_size)
        channels = CHANNELS.get(data.name, data.channels)
        if data.name in CHANNELS and (data.image_size, data.channels, data.flip) != (64, channels, False):
            raise UsageError(
                f"{data.name} are {'grey' if channels == 1 else 'RGB'}, of 64 x 64 pixels, and must not be "
                f"mirrored: data.image_size 64, data.channels {channels}, data.flip false (--image-size 64 "
                f"--channels {channels} --no-flip)"
            )
        widths = self.model.hidden_dims
        if not 1 <= len(widths) <= STAGES or min(widths) < 1:
            raise UsageError(f"model.hidden_dims must be 1 to {STAGES} positive widths, got {brief(widths)}")

    def check_ranges(self, names: Mapping[str, str]) -> None:
        """Raise ValueError for the first number out of its range; `names` replace ours in the message."""

        def require(name: str, in_range: Callable[[Any], bool], expected: str) -> None:
            section, key = name.split(".")
            value = getattr(getattr(self, section), key)
            if isinstance(value, int | float) and not (abs(value) <= LARGEST and in_range(value)):
                raise UsageError(f"{names.get(name, name)} must be {expected}, got {value}")

        for name in _POSITIVE:
            require(name, lambda value: value > 0, "positive")
        for name in _NOT_NEGATIVE:
            require(name, lambda value: value >= 0, "0 or more")
        require("training.lr_gamma", lambda gamma: gamma <= 10, "at most 10")
        require("data.image_size", lambda size: SIZES[0] <= size <= SIZES[1], "32 to 256 pixels")
        require("training.batch_size", lambda size: size >= 2, "2 or more, as BatchNorm needs")
        require("training.seed", lambda seed: 0 <= seed < 2**63, "0 to 2^63 - 1")

    def resolve(self, steps_per_epoch: int) -> "Config":
        """The same run with numbers for all options of the objective: no 'auto', no 'm_over_n', no None."""
        objective = self.objective
        iters, weight = objective.capacity_iters, objective.kl_weight
        if iters == "auto":
            iters = max(1, self.training.steps(steps_per_epoch) // 2)
        if weight is None:
            weight = "m_over_n" if objective.recon == "mean" else 1.0
        if weight == "m_over_n":
            weight = self.model.latent_dim / self.data.image_size**2
        lambda_d = objective.lambda_d
        if lambda_d is None:
            lambda_d = objective.lambda_od * (10 if objective.loss_type == "DIP-I" else 1)
        objective = dataclasses.replace(objective, capacity_iters=iters, kl_weight=weight, lambda_d=lambda_d)
        return dataclasses.replace(self, objective=objective)

    def to_yaml(self) -> str:
        """YAML that `read` turns into this configuration again."""
        return yaml.safe_dump(plain(dataclasses.asdict(self)), sort_keys=False)


_POSITIVE = (
    "data.crop",
    "model.latent_dim",
    "objective.capacity_iters",
    "objective.decoder_variance",
    "training.lr",
    "training.muon_lr",
    "training.discriminator_lr",
    "training.lr_gamma",
    "training.epochs",
    "training.max_steps",
    "training.clip_grad",
    "training.accumulate",
    "training.checkpoint_every",
    "training.log_every",
)
_NOT_NEGATIVE = (
    "objective.beta",
    "objective.gamma",
    "objective.max_capacity",
    "objective.kl_weight",
    "objective.lambda_od",
    "objective.lambda_d",
    "training.warmup",
    "training.weight_decay",
    "training.muon_weight_decay",
)


LARGEST = 3e38  # in float32


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def default_preset(data: str, device: str) -> str | None:
    """The preset for options that the user does not give; None: the defaults of `Config`.

    Args:
        data: a name of `DataConfig`. device: auto, cpu or cuda.
    """
    if data in SHAPES:
        return "burgess_sprites"
    if data in CHANNELS:
        return "locatello_rooms" if CHANNELS[data] == 3 else "locatello_sprites"
    if device == "cuda" or (device == "auto" and has_gpu()):
        return None
    return "faces_cpu" if data == "faces" else "small"


def option_places() -> dict[str, tuple[str, str]]:
    """The command-line options of a configuration, named with underscores: section and key of each."""
    config = Config()
    return {
        {"data.name": "data", "data.root": "data_root"}.get(f"{section.name}.{option.name}", option.name): (
            section.name,
            option.name,
        )
        for section in dataclasses.fields(Config)
        for option in dataclasses.fields(getattr(config, section.name))
    }


def override(config: Config, options: Mapping[str, Any]) -> Config:
    """A configuration with some values replaced by command-line options, named with underscores.

    Raises:
        UsageError: an unknown name (with the nearest one), or a value of the wrong type.
    """
    places = option_places()
    if "epochs" in options and "max_steps" not in options:
        options = {**options, "max_steps": None}  # which would win
    sections: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if name not in places:
            raise unknown_keys([name], places)
        section, key = places[name]
        sections.setdefault(section, {})[key] = value
    for section, values in sections.items():
        converted = from_mapping(type(getattr(config, section)), plain(values), f"{section}.")
        changes = {key: getattr(converted, key) for key in values}
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **changes)}
        )
    return config


def preset_or_path(name: str | Path) -> Path:
    """The path of a file if there is one, or else of the preset of that name."""
    preset, path = PRESETS / f"{Path(name).name}.yaml", expand(name)
    return preset if str(name) == preset.stem and preset.is_file() and not path.is_file() else path


class FromFile(NamedTuple):
    """What a YAML file says."""

    config: Config
    unused: list[str]  # its keys that have no counterpart here
    out: Path | None  # the run folder it names
    device: Literal["auto", "cpu", "cuda"] | None


def read(path: str | Path) -> FromFile:
    """A YAML configuration, ours or PyTorch-VAE's. Ours may name a preset as its `base`.

    Raises:
        FileNotFoundError: neither a file nor a preset.
        ValueError: not a YAML mapping, unknown keys or a value of the wrong type; names file and key.
    """
    path = preset_or_path(path)
    if not path.exists():
        presets = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise MissingError(f"no configuration at {path}; presets: {presets}")
    try:
        loaded = read_mapping(path)
        base = None
        if "base" in loaded:
            base = read(PRESETS / f"{loaded.pop('base')}.yaml").config
        ours = translate(loaded) if is_dialect(loaded) else Translation(loaded, {}, [], None, None)
        config = from_mapping(Config, ours.sections, base=base, names=ours.names)
        if ours.names:
            config.check_ranges(ours.names)
        return FromFile(config, ours.unused, ours.out and expand(ours.out), ours.device)
    except NotRead:
        raise
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None


def from_mapping(
    cls: type,
    values: Mapping[str, Any],
    prefix: str = "",
    base: Any = None,
    names: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass from a mapping, nested dataclasses from nested mappings; ValueError names the key.

    Args:
        base: has the values of keys that the mapping lacks. None: the defaults.
        names: the names of our keys in messages, where they differ.
    """
    names = names or {}
    if unknown := list(_unknown(cls, values, prefix)):
        raise unknown_keys(unknown, _known(cls, prefix))
    types = get_type_hints(cls)
    arguments = dict(vars(base)) if base else {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(types[key]):
            arguments[key] = from_mapping(types[key], value or {}, f"{name}.", arguments.get(key), names)
            continue
        name = names.get(name, name)
        try:
            arguments[key] = _convert(types[key], value)
        except TypeError:
            kind = _kind(types[key])
            undefined = "Undefined loss type. " if key == "loss_type" else ""
            raise UsageError(f"{undefined}{name} must be {kind}, got {brief(value)}") from None
        except UsageError as error:  # of a path
            raise UsageError(f"{name}: {error}") from None
    return cls(**arguments)


def _unknown(cls: type, values: Any, prefix: str) -> Iterator[str]:
    """The keys of a mapping, and of those in it, that the dataclass lacks."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{prefix.rstrip('.')} must be a section of keys, got {brief(values)}")
    types = get_type_hints(cls)
    for key, value in values.items():
        if key not in types:
            yield f"{prefix}{key}"
        elif dataclasses.is_dataclass(types[key]):
            yield from _unknown(types[key], value or {}, f"{prefix}{key}.")  # type: ignore[arg-type]


def _known(cls: type, prefix: str) -> Iterator[str]:
    """The keys of a dataclass and of those in it."""
    for key, kind in get_type_hints(cls).items():
        yield f"{prefix}{key}"
        if dataclasses.is_dataclass(kind):
            yield from _known(kind, f"{prefix}{key}.")  # type: ignore[arg-type]


def _kind(kind: Any) -> str:
    """A field's type in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _convert(kind: Any, value: Any) -> Any:
    """A YAML value as a field's type; TypeError if it cannot be converted."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for choice in choices:
            with contextlib.suppress(TypeError):
                return _convert(choice, value)
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
    elif origin is tuple and isinstance(value, list):
        return tuple(_convert(choices[0], item) for item in value)
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)  # text too: YAML 1.1 reads 5e-4 as text
    elif kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)  # NumPy's too
    elif kind is int and isinstance(value, float | str):
        with contextlib.suppress(ValueError, OverflowError):
            if float(value).is_integer():
                return int(float(value))  # 1e4
    elif kind is Path and isinstance(value, str):
        return expand(value)
    elif type(value) is kind:
        return value
    raise TypeError
