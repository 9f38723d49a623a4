"""The mutual information gap on samples of the posterior (Chen et al. 2018, appendix)."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bvae.errors import UsageError
from bvae.metrics import inputs
from bvae.metrics.information import entropy

PAIRS = 1 << 21  # of samples and posteriors at a time


def mig_sampled(
    mu: ArrayLike, log_var: ArrayLike, factors: ArrayLike, *, seed: int = 0, samples: int = 2_000
) -> float:
    """`mig` as its authors measure it: of samples z of the posteriors, with densities instead of bins.

    The aggregate posterior q(z_d) is the mixture of the N posteriors, q(z_d | v) that of the images whose
    factor has the value v; their mutual information is the mean of log q(z_d | v) - log q(z_d) over samples.
    A latent whose posterior is wide has little information, although its mean may vary. Give all images, or
    many: the own posterior of a sample is one of the N. The authors leave out dSprites' shape, which has no
    order: give the other columns. From Chen et al. 2018, "Isolating sources of disentanglement in variational
    autoencoders".

    Args:
        mu, log_var: [N, D], of the posteriors. factors: [N, K] integers.
        seed: of the images that are sampled, and of their samples.
        samples: of which the mean is taken, at most one per image.

    Returns:
        The mean over factors: 0 (no latent has more information than all others) to 1.

    Raises:
        ValueError: other shapes or types, values that are not finite, a factor without variation, or no
            samples.

    >>> import numpy as np
    >>> from bvae.metrics import mig_sampled
    >>> factors = np.indices((2, 2)).reshape(2, 4).T.repeat(50, 0)  # two independent bits
    >>> round(mig_sampled(factors.astype(float), np.full((200, 2), -9.0), factors), 3)
    1.0
    >>> round(mig_sampled(factors.astype(float), np.full((200, 2), 9.0), factors), 3)  # drowned in noise
    0.0
    """
    log_var = inputs.check_codes(log_var)
    means = inputs.check_codes(mu)
    factors = inputs.check(means, factors)[1]
    if log_var.shape != means.shape:
        raise UsageError(
            f"mu and log_var must both be [N, D], got {list(means.shape)} and {list(log_var.shape)}"
        )
    if samples < 1:
        raise UsageError(f"samples must be positive, got {samples}")
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(means))[:samples]
    z = means[rows] + np.exp(log_var[rows] / 2) * rng.standard_normal((len(rows), means.shape[1]))
    information = np.stack(
        [_information(*column, rows, factors) for column in zip(z.T, means.T, log_var.T, strict=True)]
    )
    information.sort(0)
    gaps = (information[-1] - information[-2]) / entropy(factors)
    return float(np.clip(gaps, 0, 1).mean())


def _information(
    z: NDArray[np.floating],
    mu: NDArray[np.floating],
    log_var: NDArray[np.floating],
    rows: NDArray[np.int64],
    factors: NDArray[np.int64],
) -> NDArray[np.float64]:
    """I(z_d; v_k) [K] from samples [S] of one latent, those of the images `rows`, and all posteriors [N]."""
    total = np.zeros(factors.shape[1])
    for part in np.array_split(np.arange(len(z)), math.ceil(len(z) * len(mu) / PAIRS)):
        log_density = -0.5 * ((z[part, None] - mu) ** 2 * np.exp(-log_var) + log_var)  # up to a constant
        density = np.exp(log_density - log_density.max(1, keepdims=True))
        for k, factor in enumerate(factors.T):
            counts = np.bincount(factor)
            among = density @ np.eye(len(counts))[factor] / counts  # q(z | v) of each sample and value
            own = among[np.arange(len(part)), factor[rows[part]]]
            total[k] += np.log(own / density.mean(1)).sum()
    return np.maximum(total / len(z), 0)
