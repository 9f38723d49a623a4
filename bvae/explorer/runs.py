"""The explorer of run folders: their models, and held-out images of the data they were trained on."""

from pathlib import Path

import torch
from torch import Tensor

from bvae import files
from bvae.datasets import held_out
from bvae.errors import UsageError
from bvae.evaluation.measure import trained_config
from bvae.evaluation.options import ExploreOptions
from bvae.explorer import page
from bvae.metrics import kl_per_latent
from bvae.model import BetaVAE

IMAGES = 512  # held-out images over which a latent's KL is averaged


@torch.no_grad()
def explore(options: ExploreOptions) -> Path:
    """Write the page, and return its path.

    Without a model's images there is nothing to start from, and the order of its latents is by how much they
    change the picture; a line says so.

    Raises:
        UsageError: no model, or one that cannot be shown.
    """
    options.check()
    shown = []
    starts: Tensor | None = None
    for run in options.runs:
        name = run.resolve().name
        model = BetaVAE.from_pretrained(run)
        try:
            images = _images(run)
        except (UsageError, OSError) as error:
            print(f"{name}: latents are ordered by what is seen, not by KL: {error}", flush=True)
            shown.append(page.Shown(name, model, None))
            continue
        starts = images if starts is None else starts
        posteriors = [model.encode(part.permute(0, 3, 1, 2)) for part in images.split(64)]
        mu, log_var = (torch.cat(parts) for parts in zip(*posteriors, strict=True))
        shown.append(page.Shown(name, model, kl_per_latent(mu, log_var).tolist()))
    first, *second = options.runs
    out = options.out or first / (f"explorer-{shown[1].name}.html" if second else page.NAME)
    files.make_folder(out.parent)
    page.write(out, shown, starts)
    return out


def _images(run: Path) -> Tensor:
    """Held-out images of the run's data, uint8 [N, S, S, C]. Raises UsageError, OSError."""
    config = trained_config(run)
    if config is None:
        raise UsageError("no config.yaml says which images it was trained on")
    return held_out(config.data, IMAGES)
