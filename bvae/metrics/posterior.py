"""What the Gaussian posteriors N(mu, exp(log_var)) of a data set hold; mu and log_var are [N, D]."""

import math

import torch
from torch import Tensor

SINGULAR = 1e-12  # an eigenvalue of the correlations that rounding alone may have left


def kl_per_latent(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL(posterior, N(0, 1)) of each latent in nats, the mean over images: float64 [D]."""
    _check(mu, log_var)
    mu, log_var = mu.double(), log_var.double()
    return 0.5 * (mu.square() + log_var.exp() - log_var - 1).mean(0)


def entropy_per_latent(log_var: Tensor) -> Tensor:
    """The posterior's entropy 0.5 log(2 pi e sigma^2) in nats, the mean over images: float64 [D]."""
    return 0.5 * (math.log(2 * math.pi * math.e) + log_var.double()).mean(0)


def active_units(mu: Tensor, threshold: float = 0.01) -> int:
    """Latents whose posterior mean varies over images by more than `threshold` (Burda et al. 2016)."""
    return int((mu.double().var(0) > threshold).sum())


def gaussian_total_correlation(mu: Tensor) -> float:
    """KL between a Gaussian of the codes' covariance and the product of its marginals, in nats.

    That is -0.5 log det of the codes' correlations: infinite where a latent is a sum of others. Latents that
    do not vary are independent of all.
    """
    values = mu.double()
    values = values[:, values.var(0) > 0]
    if values.shape[1] < 2:
        return 0.0
    eigenvalues = torch.linalg.eigvalsh(torch.corrcoef(values.T))
    if eigenvalues.min() <= SINGULAR:
        return math.inf
    return -0.5 * eigenvalues.log().sum().item()


def _check(mu: Tensor, log_var: Tensor) -> None:
    if mu.dim() != 2 or mu.shape != log_var.shape:
        raise ValueError(
            f"mu and log_var must both be [N, D], got {list(mu.shape)} and {list(log_var.shape)}"
        )
