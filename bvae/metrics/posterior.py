"""Statistics of a data set's Gaussian posteriors N(mu, exp(log_var)); mu and log_var are [N, D]."""

import math

import torch
from torch import Tensor

from bvae.errors import UsageError

SINGULAR = 1e-12  # an eigenvalue of the correlations that may be rounding error


def kl_per_latent(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL(posterior, N(0, 1)) of each latent (Kingma & Welling 2014, appendix B).

    Args:
        mu, log_var: [N, D].

    Returns:
        float64 [D], nats, the mean over images: 0 or more.

    Raises:
        ValueError: shapes that differ or are not [N, D].

    >>> import torch
    >>> from bvae.metrics import kl_per_latent
    >>> kl_per_latent(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2, 2))
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    _check(mu, log_var)
    mu, log_var = mu.double(), log_var.double()
    return 0.5 * (mu.square() + log_var.exp() - log_var - 1).mean(0)


def entropy_per_latent(log_var: Tensor) -> Tensor:
    """The differential entropy 0.5 log(2 pi e sigma^2) of each latent's posterior.

    Args:
        log_var: [N, D].

    Returns:
        float64 [D], nats, the mean over images; below 0 if sigma is below 0.242.

    >>> import torch
    >>> from bvae.metrics import entropy_per_latent
    >>> entropy_per_latent(torch.zeros(2, 1))  # that of N(0, 1)
    tensor([1.4189], dtype=torch.float64)
    """
    return 0.5 * (math.log(2 * math.pi * math.e) + log_var.double()).mean(0)


def active_units(mu: Tensor, threshold: float = 0.01) -> int:
    """Latents whose posterior mean has a variance over images of more than `threshold`.

    From Burda et al. 2016, "Importance weighted autoencoders".

    Args:
        mu: [N >= 2, D].

    Returns:
        Their number, 0 to D.

    >>> import torch
    >>> from bvae.metrics import active_units
    >>> active_units(torch.tensor([[1.0, 0.0], [-1.0, 0.01]]))
    1
    """
    return int((mu.double().var(0) > threshold).sum())


def gaussian_total_correlation(mu: Tensor) -> float:
    """KL between a Gaussian of the codes' covariance and the product of its marginals, in nats.

    It is -0.5 log det of the codes' correlations. Latents that do not vary are independent of all. From
    Watanabe 1960, "Information theoretical analysis of multivariate correlation".

    Args:
        mu: [N >= 2, D].

    Returns:
        0 (no correlation) or more; infinite if a latent is a linear combination of others.

    >>> import torch
    >>> from bvae.metrics import gaussian_total_correlation
    >>> x = torch.tensor([[1.0, 1.0]] * 3 + [[1.0, -1.0]])  # with -x, a correlation of 0.5
    >>> round(gaussian_total_correlation(torch.cat([x, -x])), 4)
    0.1438
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
        raise UsageError(
            f"mu and log_var must both be [N, D], got {list(mu.shape)} and {list(log_var.shape)}"
        )
