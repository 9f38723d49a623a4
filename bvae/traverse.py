"""Walk along a model's latents and show what each does: `python -m bvae.traverse runs/faces-B-1`.

A row starts from the code of an image (or from z = 0) and changes one latent at a time.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor

from bvae.arguments import choose_device
from bvae.command import exit_status
from bvae.model import BetaVAE
from bvae.reference import scale_pixels
from bvae.report import COLOURS, grid, to_uint8

SHOWN = 10  # latents, unless they are named
BATCH = 256  # images decoded at a time


@dataclass(frozen=True)
class Arguments:
    """What to walk along, and where the picture goes."""

    run: Annotated[Path, tyro.conf.arg(name="RUN"), tyro.conf.Positional]
    """A run folder, or any folder with model.safetensors and config.json."""
    image: Path | None = None
    """The picture to start from. None: z = 0, the mean of the prior."""
    crop: int | None = None
    """Side of the centred square that is cut out of the image, in pixels (148 for CelebA and the drawn
    faces, if that is what the model was trained on). None: the largest square."""
    latents: tuple[int, ...] = ()
    """Which latents, in this order. None given: the ten that change the picture most."""
    range: tuple[float, float] = (-3, 3)
    """First and last value of a latent, in standard deviations of the prior."""
    steps: int = 11
    """Pictures from the first to the last value."""
    out: Path | None = None
    """The picture to write: .png shows all steps side by side, .gif one after another, there and back.
    None: traverse.png in the folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    def check(self, latent_dim: int) -> None:
        """Raise ValueError for the first value out of its range."""
        for latent in self.latents:
            if not 0 <= latent < latent_dim:
                raise ValueError(f"--latents must be 0 to {latent_dim - 1} for this model, got {latent}")
        if not all(np.isfinite(self.range)) or self.range[0] == self.range[1]:
            raise ValueError(f"--range must be two different numbers, got {self.range[0]} {self.range[1]}")
        if self.steps < 2:
            raise ValueError(f"--steps must be at least 2, got {self.steps}")
        if self.crop is not None and self.crop < 1:
            raise ValueError(f"--crop must be positive, got {self.crop}")
        if self.out and self.out.suffix.lower() not in (".png", ".gif"):
            raise ValueError(f"--out must end in .png or .gif, got {self.out}")


def read_image(path: Path, crop: int | None, shape: tuple[int, int, int], activation: str) -> Tensor:
    """An image file as [1, C, H, W] in the model's range: turned upright, the centred square, resized.

    Raises:
        OSError: the file is missing or no image.
        ValueError: the image is smaller than the crop.
    """
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened).convert("L" if shape[0] == 1 else "RGB")
    side = crop or min(upright.size)
    if side > min(upright.size):
        width, height = upright.size
        raise ValueError(f"{path}: {width} x {height} pixels are smaller than the crop of {side}")
    left, top = (round((length - side) / 2) for length in upright.size)
    square = upright.crop((left, top, left + side, top + side))
    pixels = np.array(square.resize(shape[1:], Image.Resampling.BILINEAR)).reshape(1, *shape[1:], shape[0])
    return scale_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2), -1.0 if activation == "tanh" else 0.0)


@torch.no_grad()
def traverse(model: BetaVAE, z: Tensor, latents: Sequence[int], values: Tensor) -> Tensor:
    """Decode z [1, latent_dim] with each latent at each value: uint8 [latents, values, H, W, 3]."""
    walked = z.repeat(len(latents) * len(values), 1)
    columns = torch.tensor(latents, device=z.device).repeat_interleave(len(values))
    walked[torch.arange(len(walked), device=z.device), columns] = values.to(z).repeat(len(latents))
    images = [to_uint8(model.decode(part), model.activation) for part in walked.split(BATCH)]
    return torch.cat(images).unflatten(0, (len(latents), len(values)))


def most_visible(images: Tensor, count: int) -> list[int]:
    """The rows of uint8 [latents, values, H, W, 3] that change most from value to value, most first."""
    change = torch.stack([row.float().var(0).mean() for row in images])
    return change.argsort(descending=True)[:count].tolist()


def save(images: Tensor, labels: Sequence[str], path: Path) -> None:
    """Write rows of uint8 [latents, values, H, W, 3] as a PNG or, one value after another, as a GIF."""
    if path.suffix.lower() == ".png":
        grid(list(images), labels).save(path)
        return
    there_and_back = [*range(images.shape[1]), *range(images.shape[1] - 2, 0, -1)]
    frames = [
        grid([row[[t]] for row in images], labels).quantize(COLOURS, dither=Image.Dither.NONE)
        for t in there_and_back
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)


def draw(arguments: Arguments) -> Path:
    """Walk, and give the path of the picture."""
    model = BetaVAE.from_pretrained(arguments.run).to(choose_device(arguments.device))
    arguments.check(model.latent_dim)
    device = model.head.weight.device
    z = torch.zeros(1, model.latent_dim, device=device)
    if arguments.image:
        x = read_image(arguments.image, arguments.crop, model.input_shape, model.activation)
        with torch.no_grad():
            z = model.encode(x.to(device))[0]
    values = torch.linspace(*arguments.range, arguments.steps)
    latents = list(arguments.latents)
    if latents:
        images = traverse(model, z, latents, values)
    else:
        everything = traverse(model, z, range(model.latent_dim), values)
        latents = most_visible(everything, SHOWN)
        images = everything[latents]
    out = arguments.out or arguments.run / "traverse.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    save(images, [f"latent {i}\nstarts at {z[0, i]:.2f}" for i in latents], out)
    return out


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 not as asked for."""
    arguments = tyro.cli(Arguments, args=argv, description=__doc__, prog="python -m bvae.traverse")
    return exit_status(lambda: print(draw(arguments)))


if __name__ == "__main__":
    sys.exit(main())
