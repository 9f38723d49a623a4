"""A convolutional network of your own, trained, saved and loaded by name.

python examples/own_network.py

The commands know it as well, from this folder:
python -m bvae.train --import own_network --arch gelu
python -m bvae.sample RUN --import own_network
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from torch import nn

import bvae
from bvae.architectures import Network
from bvae.errors import UsageError, exit_status
from bvae.pipelines import faces


def gelu(channels: int, size: int, latent_dim: int, widths: Sequence[int]) -> Network:
    """A convolution with GELU for each of `widths` (--hidden-dims), each of which halves the size."""
    if size % 2 ** len(widths):
        raise UsageError(f"arch gelu halves {size} pixels {len(widths)} times: use fewer --hidden-dims")
    stages = [channels, *widths]
    side = size // 2 ** len(widths)
    code_shape = (widths[-1], side, side)
    down = [
        nn.Sequential(nn.Conv2d(a, b, 4, stride=2, padding=1), nn.GroupNorm(1, b), nn.GELU())
        for a, b in pairwise(stages)
    ]
    up = [
        nn.Sequential(nn.GELU(), nn.ConvTranspose2d(b, a, 4, stride=2, padding=1))
        for a, b in reversed(list(pairwise(stages)))
    ]
    return Network(
        encoder=nn.Sequential(*down),  # images [N, C, S, S] to features [N, *code_shape]
        head=nn.Linear(widths[-1] * side * side, 2 * latent_dim),  # features to mu and log_var
        decoder_input=nn.Linear(latent_dim, widths[-1] * side * side),  # z to codes
        code_shape=code_shape,
        decoder=nn.Sequential(*up),  # codes to images, before tanh or sigmoid
    )


bvae.register_architecture("gelu", gelu)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gelu"), help="default: %(default)s")
    parser.add_argument("--n", type=int, default=2000, help="drawn faces; default: %(default)s")
    parser.add_argument("--max-steps", type=int, default=1000, help="default: %(default)s")
    options = parser.parse_args()
    drawn = Path("data/own_network")
    faces.write_missing(drawn, options.n)
    bvae.fit(
        drawn / "celeba",
        out=options.out,
        arch="gelu",
        hidden_dims=(32, 64, 128),
        latent_dim=10,
        max_steps=options.max_steps,
    )
    model = bvae.BetaVAE.from_pretrained(options.out)  # where "gelu" is registered
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters; see {options.out / 'traversals.gif'}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
