"""Change a model's latents and show what each does: `python -m bvae.traverse runs/faces-B-1`.

A row starts from the code of an image (or from z = 0) and changes one latent at a time.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from bvae.errors import UsageError, exit_status, needs_train_extra

with needs_train_extra(__name__):
    import numpy as np
    import torch
    import tyro

    from bvae.device import choose_device
    from bvae.images import read_image
    from bvae.model import BetaVAE
    from bvae.plots import most_visible, save_traversal, traverse

SHOWN = 10  # latents, unless they are named


@dataclass(frozen=True)
class Arguments:
    """Which latents to change, and where to write the picture."""

    run: Annotated[Path, tyro.conf.arg(name="RUN"), tyro.conf.Positional]
    """A run folder, or any folder with model.safetensors and config.json."""
    image: Path | None = None
    """The picture to start from. None: z = 0, the mean of the prior."""
    crop: int | None = None
    """Side of the centred square that is cropped from the image, in pixels (148 if the model was trained on
    CelebA or the drawn faces). None: the largest square."""
    latents: tuple[int, ...] = ()
    """Which latents, in this order. Without it: the ten that change the picture most."""
    range: tuple[float, float] = (-3, 3)
    """First and last value of a latent, in standard deviations of the prior."""
    steps: int = 11
    """Number of pictures from the first to the last value."""
    out: Path | None = None
    """The picture to write: .png shows all steps side by side, .gif one after another, forward and backward.
    None: traverse.png in the folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    def check(self, latent_dim: int) -> None:
        """Raise ValueError for the first value out of its range."""
        for latent in self.latents:
            if not 0 <= latent < latent_dim:
                raise UsageError(f"--latents must be 0 to {latent_dim - 1} for this model, got {latent}")
        if not all(np.isfinite(self.range)) or self.range[0] == self.range[1]:
            raise UsageError(f"--range must be two different numbers, got {self.range[0]} {self.range[1]}")
        if self.steps < 2:
            raise UsageError(f"--steps must be at least 2, got {self.steps}")
        if self.crop is not None and self.crop < 1:
            raise UsageError(f"--crop must be positive, got {self.crop}")
        if self.out and self.out.suffix.lower() not in (".png", ".gif"):
            raise UsageError(f"--out must end in .png or .gif, got {self.out}")


def draw(arguments: Arguments) -> Path:
    """Decode and write the picture; return its path."""
    model = BetaVAE.from_pretrained(arguments.run).to(choose_device(arguments.device))
    arguments.check(model.latent_dim)
    device = model.head.weight.device
    z = torch.zeros(1, model.latent_dim, device=device)
    if arguments.image:
        x = read_image(arguments.image, arguments.crop, model.input_shape, model.pixel_range)
        with torch.no_grad():
            z = model.encode(x.to(device))[0]
    values = torch.linspace(*arguments.range, arguments.steps)
    latents = list(arguments.latents)
    if latents:
        images = traverse(model, z, latents, values)
    else:
        all_images = traverse(model, z, range(model.latent_dim), values)
        latents = most_visible(all_images, SHOWN)
        images = all_images[latents]
    out = arguments.out or arguments.run / "traverse.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_traversal(images, [f"latent {i}\nstarts at {z[0, i]:.2f}" for i in latents], out)
    return out


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 input that cannot be used."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__, prog="python -m bvae.traverse")
    return exit_status(lambda: print(draw(arguments)))


if __name__ == "__main__":
    sys.exit(main())
