"""Validate a model on images that it was not trained on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bvae.model import BetaVAE
from bvae.ops import reparam_kl
from bvae.penalties import Penalty
from bvae.pipelines.loader import Loader
from bvae.training.distributed import Distributed
from bvae.training.step import pixel_mse

ACTIVE_KL = 0.01  # nats; a latent with a higher KL is active: below it, its code is nearly constant


class Validation(NamedTuple):
    """Averages over all validation images."""

    loss: float  # the training objective, with C as in the last training step
    mse: float  # per pixel and channel, posterior samples, in the decoder's range
    kld: float  # nats per image
    elbo: float  # nats per image, without the constant of a Gaussian's density; higher is better
    explained_variance: float  # 1 - squared error of the posterior means' reconstructions / pixel variance
    kl_per_dim: list[float]  # nats per latent
    penalty: float | None = None  # without its weight; None if the objective has none

    @property
    def values(self) -> dict[str, float | list[float]]:
        """What there is of these, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def active_latents(kl: Sequence[float]) -> NDArray[np.bool_]:
    """Which latents carry information, from the KL of each in nats: [D]. All, if none does.

    Stretched over 20 bins, the nearly constant code of any other looks informative, but a walk along it
    changes nothing: latents are chosen and shown among the active ones.
    """
    active = np.asarray(kl) > ACTIVE_KL
    return active if active.any() else ~active


@torch.no_grad()
def validate(
    model: BetaVAE,
    loss: nn.Module,
    data: Loader,
    seed: int,
    dtype: torch.dtype | None,
    distributed: Distributed = Distributed(),  # noqa: B008 (frozen)
    penalty: Penalty | None = None,
) -> Validation:
    """Run the model in evaluation mode over the data, unflipped, with the same loss weights as in training.

    The pixel variance is around the data's mean image: a model that always returns that image explains 0, and
    a perfect model explains 1. The noise is a function of (seed, batch), so each call draws the same noise.
    With several processes, each takes its share of the batches. A penalty is estimated in each batch, and
    averaged over those that have enough images for it; NaN if none has.
    """
    model.eval(), loss.eval()
    device = data.device
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    penalised = torch.zeros(2, dtype=torch.float64, device=device)  # sum of the penalty, images
    kl_per_dim = torch.zeros(model.latent_dim, dtype=torch.float64, device=device)
    error = torch.zeros((), dtype=torch.float64, device=device)
    pixels = torch.zeros(model.input_shape, dtype=torch.float64, device=device)
    squares = torch.zeros_like(pixels)
    for number, (images, _) in enumerate(data.epoch(0)):
        batch = number * distributed.world_size + distributed.rank
        target = images.permute(0, 3, 1, 2)
        x = model.scale(target)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            mu, log_var = model.encode_scaled(x)
            z, kl, kl_dim = reparam_kl(mu, log_var, seed=seed, step=-1 - batch, per_dim=True)
            raw, mean = model.decode_raw(z), model.decode(mu)
        terms = loss(raw, target, kl)
        n = len(images)
        summed = raw[0].numel() if getattr(loss, "reduction", "sum") == "mean" else 1
        elbo = -terms.recon * summed - terms.kld
        totals += n * torch.stack([terms.loss, pixel_mse(model, loss, terms, raw, target), terms.kld, elbo])
        if penalty is not None and n >= penalty.least_batch:
            value = penalty(z, mu, log_var)
            penalised += n * torch.stack([value, torch.ones_like(value)])
        kl_per_dim += n * kl_dim
        error += (mean - x).double().square().sum()
        pixels += x.double().sum(0)
        squares += x.double().square().sum(0)
    model.train(), loss.train()

    distributed.all_reduce_sum([totals, penalised, kl_per_dim, error, pixels, squares])
    count = data.count
    variance = (squares - pixels.square() / count).sum()
    loss_mean, mse, kld, elbo_mean = (totals / count).tolist()
    explained = 1 - (error / variance).item() if variance > 0 else math.nan
    penalty_mean = None
    if penalty is not None:
        penalty_mean = (penalised[0] / penalised[1]).item()
        loss_mean += penalty.weight * penalty_mean
    return Validation(loss_mean, mse, kld, elbo_mean, explained, (kl_per_dim / count).tolist(), penalty_mean)
