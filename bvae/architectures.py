"""The networks by name: each has an encoder, the heads and a decoder, for square images.

    pytorch-vae   convolutions 3x3 with BatchNorm and LeakyReLU; width and depth are options
    burgess       Burgess et al. (2018): 4 convolutions 4x4 of 32 channels, two layers of 256
    higgins-fc    Higgins et al. (2017) for 2D shapes: two layers of 1200; in the decoder three, with tanh
    locatello     Locatello et al. (2019): 4 convolutions of 32, 32, 64, 64 channels, a layer of 256

The heads compute mu and log_var in one matrix product. A decoder's output is before the activation.
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from bvae.errors import UsageError
from bvae.layers import BatchNormLeakyReLU, Downsample, ToImage, Upsample


class Network(NamedTuple):
    """The parts of a model, in the order of the data."""

    encoder: nn.Module  # images [N, C, S, S] to features [N, ...]
    head: nn.Linear  # features, flattened, to [N, 2 latent_dim]
    decoder_input: nn.Module  # z [N, latent_dim] to codes, flattened
    code_shape: tuple[int, ...]  # of a code
    decoder: nn.Module  # codes [N, *code_shape] to images [N, C, S, S]


# --- PyTorch-VAE ------------------------------------------------------------------------------------------
def pytorch_vae(channels: int, size: int, latent_dim: int, widths: Sequence[int]) -> Network:
    """PyTorch-VAE's network. There it has 3 937 635 parameters, with biases that have no effect."""
    # Each stage halves the size, rounding up; the decoder uses the same sizes in reverse.
    sizes = [size]
    for _ in widths:
        sizes.append((sizes[-1] + 1) // 2)
    code_shape = (widths[-1], sizes[-1], sizes[-1])
    code = math.prod(code_shape)
    return Network(
        nn.Sequential(*(_down(a, b) for a, b in pairwise((channels, *widths)))),
        nn.Linear(code, 2 * latent_dim),
        nn.Linear(latent_dim, code),
        code_shape,
        nn.Sequential(
            *(
                _up(widths[i], widths[max(i - 1, 0)], sizes[i + 1], sizes[i])
                for i in reversed(range(len(widths)))
            ),
            ToImage(widths[0], channels),
        ),
    )


def _down(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(Downsample(in_channels, out_channels), BatchNormLeakyReLU(out_channels))


def _up(in_channels: int, out_channels: int, size: int, new_size: int) -> nn.Sequential:
    return nn.Sequential(
        Upsample(in_channels, out_channels, size, new_size), BatchNormLeakyReLU(out_channels)
    )


# --- The papers' ------------------------------------------------------------------------------------------
def burgess(channels: int, size: int, latent_dim: int, widths: Sequence[int]) -> Network:
    """502 005 parameters for grey images of 64 x 64 and 10 latents; `widths` is not used."""
    code_shape = (32, size // 16, size // 16)
    code = math.prod(code_shape)
    return Network(
        nn.Sequential(_halve(channels, 32, 32, 32, 32), nn.Flatten(), _dense(nn.ReLU, code, 256, 256)),
        nn.Linear(256, 2 * latent_dim),
        _dense(nn.ReLU, latent_dim, 256, 256, code),
        code_shape,
        _double(32, 32, 32, 32, channels),
    )


def higgins_fc(channels: int, size: int, latent_dim: int, widths: Sequence[int]) -> Network:
    """14 196 516 parameters for grey images of 64 x 64 and 10 latents; `widths` is not used."""
    pixels = channels * size * size
    return Network(
        nn.Sequential(nn.Flatten(), _dense(nn.ReLU, pixels, 1200, 1200)),
        nn.Linear(1200, 2 * latent_dim),
        _dense(nn.Tanh, latent_dim, 1200, 1200, 1200),
        (1200,),
        nn.Sequential(nn.Linear(1200, pixels), nn.Unflatten(1, (channels, size, size))),
    )


def locatello(channels: int, size: int, latent_dim: int, widths: Sequence[int]) -> Network:
    """690 517 parameters for grey images of 64 x 64 and 10 latents; `widths` is not used."""
    code_shape = (64, size // 16, size // 16)
    code = math.prod(code_shape)
    # 'same' padding with stride 2 is 1 on each side for a kernel of 4, and none for a kernel of 2.
    quarter = nn.Sequential(
        *(nn.Conv2d(32, 64, 2, stride=2), nn.ReLU(inplace=True)),
        *(nn.Conv2d(64, 64, 2, stride=2), nn.ReLU(inplace=True)),
    )
    return Network(
        nn.Sequential(_halve(channels, 32, 32), quarter, nn.Flatten(), _dense(nn.ReLU, code, 256)),
        nn.Linear(256, 2 * latent_dim),
        _dense(nn.ReLU, latent_dim, 256, code),
        code_shape,
        _double(64, 64, 32, 32, channels),
    )


def _halve(*widths: int) -> nn.Sequential:
    """Convolutions of those widths, each of which halves an even size."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _double(*widths: int) -> nn.Sequential:
    """Transposed convolutions of those widths, each of which doubles the size; none after the last."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def _dense(activation: Callable[[], nn.Module], *widths: int) -> nn.Sequential:
    """Linear layers of those widths, an activation after each."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers)


# --- By name ----------------------------------------------------------------------------------------------
Builder = Callable[[int, int, int, Sequence[int]], Network]

ARCHITECTURES: dict[str, Builder] = {
    "pytorch-vae": pytorch_vae,
    "burgess": burgess,
    "higgins-fc": higgins_fc,
    "locatello": locatello,
}
STAGES = 64  # most hidden_dims; an image of 256 pixels is one pixel after 8 stages
HALVINGS = {"burgess": 4, "locatello": 4}  # how often a network halves the size, which must be even each time


def register_architecture(name: str, builder: Builder) -> None:
    """Register your own network under a name, for `BetaVAE(arch=name)`, `--arch` and `from_pretrained`.

    Args:
        builder: called as `builder(channels, size, latent_dim, widths)`, size in pixels; returns a `Network`.

    Raises:
        UsageError: another network already has the name.

    Example:
        >>> from torch import nn
        >>> from bvae import BetaVAE, register_architecture
        >>> from bvae.architectures import Network
        >>> def linear(channels, size, latent_dim, widths):
        ...     pixels = channels * size * size
        ...     decoder = nn.Unflatten(1, (channels, size, size))
        ...     head, back = nn.Linear(pixels, 2 * latent_dim), nn.Linear(latent_dim, pixels)
        ...     return Network(nn.Flatten(), head, back, (pixels,), decoder)
        >>> register_architecture("linear", linear)
        >>> BetaVAE(1, latent_dim=3, image_size=32, arch="linear").sample(2).shape
        torch.Size([2, 1, 32, 32])
    """
    if not isinstance(name, str) or not callable(builder):
        raise UsageError(f"register_architecture takes a name and a function, got {name!r} and {builder!r}")
    registered = ARCHITECTURES.get(name)
    if registered and (registered.__module__, registered.__qualname__) != (
        builder.__module__,
        builder.__qualname__,
    ):
        raise UsageError(f"arch {name} is already registered by {registered.__module__}: choose another name")
    ARCHITECTURES[name] = builder  # the same builder again if its module was imported again


def import_module(name: str) -> None:
    """Import a user's module that registers networks, also from the current folder. Raises UsageError."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise  # the module imports something that is missing
        raise UsageError(f"--import {name}: no such module, and no {name}.py in this folder") from None


def is_ours(arch: Any) -> bool:
    """Whether an architecture is one of this file's, which can be built on `meta`."""
    return isinstance(arch, str) and getattr(ARCHITECTURES.get(arch), "__module__", None) == __name__


def check_size(arch: str, size: int) -> None:
    """Raise UsageError for an unknown architecture, or for images whose side it cannot take."""
    if arch not in ARCHITECTURES:
        raise UsageError(
            f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}: your own network is known "
            "once the module that registers it is imported (--import MODULE)"
        )
    side = 2 ** HALVINGS.get(arch, 0)
    if size % side:
        raise UsageError(f"arch {arch} takes images whose side is a multiple of {side} pixels, got {size}")
