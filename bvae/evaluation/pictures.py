"""Pictures of a saved model: samples of the prior, and walks along its latents."""

from pathlib import Path

import torch

from bvae import files
from bvae.device import choose_device
from bvae.errors import UsageError
from bvae.evaluation.measure import kl_per_latent
from bvae.evaluation.options import SampleOptions, TraverseOptions
from bvae.images import read_image, to_uint8
from bvae.model import BetaVAE
from bvae.plots import grid, most_visible, save_traversal, traverse
from bvae.training.records import validated_kl

SHOWN = 10  # latents, unless they are named
BATCH = 256  # samples decoded at a time


def draw(arguments: TraverseOptions) -> Path:
    """Decode and write the picture; return its path."""
    model = BetaVAE.from_pretrained(arguments.run).to(choose_device(arguments.device))
    arguments.check(model.latent_dim)
    device = model.head.weight.device
    z = torch.zeros(1, model.latent_dim, device=device)
    kl = validated_kl(arguments.run, model.latent_dim)
    if arguments.image:
        x = read_image(arguments.image, arguments.crop, model.input_shape, model.pixel_range)
        with torch.no_grad():
            z, log_var = model.encode(x.to(device))
        kl = kl_per_latent(model, z, log_var).tolist()
    values = torch.linspace(*arguments.range, arguments.steps)
    latents = list(arguments.latents)
    if latents:
        images = traverse(model, z, latents, values)
    else:
        all_images = traverse(model, z, range(model.latent_dim), values)
        latents = most_visible(all_images, SHOWN)
        images = all_images[latents]
    out = arguments.out or arguments.run / "traverse.png"
    files.make_folder(out.parent)
    labels = [
        f"latent {i}" + (f", KL {kl[i]:.2f}" if kl else "") + f"\nstarts at {z[0, i]:.2f}" for i in latents
    ]
    save_traversal(images, labels, values, out)
    return out


def sample(arguments: SampleOptions) -> Path:
    """Draw and write the images; return their path."""
    if arguments.n < 1:
        raise UsageError(f"--n must be positive, got {arguments.n}")
    model = BetaVAE.from_pretrained(arguments.run, arguments.which).to(choose_device(arguments.device))
    generator = torch.Generator(model.head.weight.device).manual_seed(arguments.seed)
    sizes = [min(BATCH, arguments.n - start) for start in range(0, arguments.n, BATCH)]
    images = [to_uint8(model.sample(size, generator), model.pixel_range) for size in sizes]
    out = arguments.out or arguments.run / f"samples-{arguments.n}.png"
    if out.suffix.lower() == ".png":
        files.make_folder(out.parent)
        columns = max(1, round(arguments.n**0.5))
        files.write_image(out, grid(torch.cat(images).split(columns)))
        return out
    files.make_folder(out)
    for number, image in enumerate(picture for part in images for picture in part):
        files.write_image(out / f"{number:05}.png", grid([image[None]]))
    return out
