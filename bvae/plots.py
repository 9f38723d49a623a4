"""Pictures of what a model has learned: grids, traversals as PNG and GIF, and matrices."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bvae import files
from bvae.images import to_uint8
from bvae.model import BetaVAE

# --- Grids ------------------------------------------------------------------------------------------------
MARGIN = 2  # pixels between pictures
LABEL = 92  # pixels for a row's text, or more if it needs them
HEADER = 16  # pixels for the columns' texts


def grid(rows: Sequence[Tensor], labels: Sequence[str] = (), columns: Sequence[str] = ()) -> Image.Image:
    """Rows of uint8 images [N, H, W, 3] as one picture, with a label left of each row, above each column."""
    height, width = rows[0].shape[1:3]
    font = ImageFont.load_default(12)
    left = _width(labels, font) if labels else 0
    header = HEADER if columns else 0
    across = max(len(row) for row in rows)
    size = (left + across * (width + MARGIN) - MARGIN, header + len(rows) * (height + MARGIN) - MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for j, column in enumerate(columns):
        middle = left + j * (width + MARGIN) + width / 2
        draw.text((middle, header / 2), column, fill="black", font=font, anchor="mm")
    for i, row in enumerate(rows):
        top = header + i * (height + MARGIN)
        if labels:
            draw.multiline_text((4, top + height // 2 - 14), labels[i], fill="black", font=font)
        for j, image in enumerate(row):
            canvas.paste(Image.fromarray(image.numpy()), (left + j * (width + MARGIN), top))
    return canvas


def _width(labels: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """Pixels for the longest line of the texts."""
    lines = [line for label in labels for line in label.splitlines()]
    return max(LABEL, *(math.ceil(font.getlength(line)) + 8 for line in lines))


# --- Traversals -------------------------------------------------------------------------------------------
BATCH = 256  # images decoded at a time
FRAMES = 8  # of a run's GIF, in one direction
FACES = 4  # side by side in a run's GIF
COLOURS = 48  # in a frame of a GIF, to keep a run's GIF under a megabyte


@torch.no_grad()
def traverse(model: BetaVAE, z: Tensor, latents: Sequence[int], values: Tensor) -> Tensor:
    """Decode z [N, latent_dim] with each latent at each value: uint8 [latents, values, N, H, W, 3]."""
    n, places = len(z), len(latents) * len(values)
    codes = z.repeat(places, 1)
    columns = torch.tensor(latents, device=z.device).repeat_interleave(len(values) * n)
    rows = torch.arange(len(codes), device=z.device)
    codes[rows, columns] = values.to(z).repeat_interleave(n).repeat(len(latents))
    images = [to_uint8(model.decode(part), model.pixel_range) for part in codes.split(BATCH)]
    return torch.cat(images).unflatten(0, (len(latents), len(values), n))


def most_visible(images: Tensor, count: int) -> list[int]:
    """The rows of uint8 [latents, values, N, H, W, 3] that change most from value to value, most first."""
    change = torch.stack([row.float().var(0).mean() for row in images])
    return change.argsort(descending=True)[:count].tolist()


def save_traversal(images: Tensor, labels: Sequence[str], values: Tensor, path: Path) -> None:
    """Write uint8 [rows, values, N, H, W, 3]: a PNG with the values side by side, or a GIF, forward and back.

    A PNG shows the first of the N images under the values, a GIF all of them.
    """
    if path.suffix.lower() == ".png":
        columns = [f"{round(value, 2) + 0.0:g}" for value in values.tolist()]  # + 0.0: no -0
        files.write_image(path, grid(list(images[:, :, 0]), labels, columns))
        return
    times = [*range(images.shape[1]), *range(images.shape[1] - 2, 0, -1)]
    frames = [grid(list(images[:, t]), labels).quantize(COLOURS, dither=Image.Dither.NONE) for t in times]
    files.write_image(path, frames[0], save_all=True, append_images=frames[1:], duration=100, loop=0)


def by_kl(kl_per_dim: Sequence[float], count: int) -> tuple[list[int], list[str]]:
    """The `count` latents with the highest KL, highest first, and a label with the nats of each."""
    latents = sorted(range(len(kl_per_dim)), key=lambda i: -kl_per_dim[i])[:count]
    return latents, [f"latent {i}\nKL {kl_per_dim[i]:.2f} nats" for i in latents]


def most_typical(mu: Tensor) -> Tensor:
    """Of posterior means [N, latent_dim] the one with the smallest norm: [1, latent_dim]."""
    return mu[mu.norm(dim=1).argmin()].unsqueeze(0)


@torch.no_grad()
def progress_pictures(
    model: BetaVAE, x: Tensor, kl_per_dim: Sequence[float], rows: int = 5, steps: int = 7
) -> dict[str, Image.Image]:
    """What a model in training has learned so far, for its log: "reconstructions" and "traversals".

    Keeps the model in its mode.

    Args:
        x: validation images [N, C, H, W] in the decoder's range. The traversals start from the most typical.
        kl_per_dim: nats per latent; the `rows` latents with the highest KL are traversed, highest first.
        steps: values of each latent, from -3 to 3.
    """
    training = model.training
    model.eval()
    pairs = [to_uint8(part, model.pixel_range) for part in (x, model.reconstruct(x))]
    latents, labels = by_kl(kl_per_dim, rows)
    walks = traverse(model, most_typical(model.encode(x)[0]), latents, torch.linspace(-3, 3, steps))
    model.train(training)
    return {
        "reconstructions": grid(pairs, ["input", "reconstruction"]),
        "traversals": grid(list(walks[:, :, 0]), labels),
    }


@torch.no_grad()
def save_pictures(model: BetaVAE, x: Tensor, kl_per_dim: Sequence[float], out: Path, rows: int = 8) -> None:
    """Write reconstructions.png, samples.png, traversals.png and traversals.gif.

    Leaves the model in evaluation mode.

    Args:
        x: validation images [N, C, H, W] in the decoder's range. The traversals of the PNG start from the
            most typical one, whose mu has the smallest norm; those of the GIF from the first ones.
        kl_per_dim: nats per latent; the `rows` latents with the highest KL are traversed, highest first.
    """
    model.eval()
    parts = [part for x8 in x[:32].split(8) for part in (x8, model.reconstruct(x8))]
    pairs = [to_uint8(part, model.pixel_range) for part in parts]
    labels = ["input", "reconstruction"] * (len(pairs) // 2)
    files.write_image(out / "reconstructions.png", grid(pairs, labels))
    generator = torch.Generator(x.device).manual_seed(0)
    samples = to_uint8(model.sample(64, generator), model.pixel_range)
    files.write_image(out / "samples.png", grid(samples.split(8)))

    latents, labels = by_kl(kl_per_dim, rows)
    mu = model.encode(x)[0]
    for start, steps, name in (
        (most_typical(mu), 11, "traversals.png"),
        (mu[:FACES], FRAMES, "traversals.gif"),
    ):
        values = torch.linspace(-3, 3, steps)
        save_traversal(traverse(model, start, latents, values), labels, values, out / name)


# --- Matrices ---------------------------------------------------------------------------------------------
CELL = (64, 26)  # pixels
LEFT, TOP = 130, 52  # for the latents' and the factors' names
GAP = 24  # between two matrices
EMPTY, FULL = np.array([255, 255, 255]), np.array([8, 48, 107])  # the colours of 0 and 1


def heat_map(matrices: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Draw matrices [rows, columns] of 0 to 1 under their titles, white to dark blue, with their values."""
    width, height = CELL
    across = width * len(columns)
    canvas = Image.new("RGB", (LEFT + len(matrices) * (across + GAP), TOP + height * len(rows) + 4), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(11)
    for i, name in enumerate(rows):
        draw.text((LEFT - 8, TOP + i * height + height / 2), name, "black", font, "rm")
    for number, (title, matrix) in enumerate(matrices.items()):
        left = LEFT + number * (across + GAP)
        draw.text((left, 14), title, "black", ImageFont.load_default(13), "lm")
        for j, name in enumerate(columns):
            draw.text((left + (j + 0.5) * width, TOP - 12), name[:11], "black", font, "mm")
            for i, value in enumerate(matrix[:, j]):
                x, y = left + j * width, TOP + i * height
                colour = (EMPTY + (FULL - EMPTY) * value).round().astype(int)
                draw.rectangle((x, y, x + width - 2, y + height - 2), tuple(colour))
                text = "white" if value > 0.5 else "black"
                draw.text((x + width / 2, y + height / 2), f"{value:.2f}", text, font, "mm")
    return canvas
