"""Draw new images from a trained model: `python -m bvae.sample runs/faces-B-1 --n 64`.

They are decoded from samples of the prior, z ~ N(0, I).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from bvae import files
from bvae.errors import UsageError, exit_status, needs_train_extra

with needs_train_extra(__name__):
    import torch
    import tyro

    from bvae.device import choose_device
    from bvae.images import to_uint8
    from bvae.model import BetaVAE
    from bvae.plots import grid

BATCH = 256  # images decoded at a time


@dataclass(frozen=True)
class Arguments:
    """Which model, how many images, and where to write them."""

    run: Annotated[Path, tyro.conf.arg(name="RUN"), tyro.conf.Positional]
    """A run folder, or any folder of a saved model."""
    n: int = 64
    """How many images."""
    seed: int = 0
    """The same seed draws the same z."""
    which: Literal["last", "best"] = "last"
    """For a run: the newest state, or the best checkpoint by validation ELBO."""
    out: Path | None = None
    """A .png file: all images in one picture. A folder: each image in a file, 00000.png and so on.
    None: samples-<n>.png in the run folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""


def sample(arguments: Arguments) -> Path:
    """Draw and write the images; return their path."""
    if arguments.n < 1:
        raise UsageError(f"--n must be positive, got {arguments.n}")
    model = BetaVAE.from_pretrained(arguments.run, arguments.which).to(choose_device(arguments.device))
    generator = torch.Generator(model.head.weight.device).manual_seed(arguments.seed)
    sizes = [min(BATCH, arguments.n - start) for start in range(0, arguments.n, BATCH)]
    images = [to_uint8(model.sample(size, generator), model.pixel_range) for size in sizes]
    out = arguments.out or arguments.run / f"samples-{arguments.n}.png"
    if out.suffix.lower() == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        columns = max(1, round(arguments.n**0.5))
        files.write_image(out, grid(torch.cat(images).split(columns)))
        return out
    out.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(picture for part in images for picture in part):
        files.write_image(out / f"{number:05}.png", grid([image[None]]))
    return out


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 input that cannot be used."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__, prog="python -m bvae.sample")
    return exit_status(lambda: print(sample(arguments)))


if __name__ == "__main__":
    sys.exit(main())
