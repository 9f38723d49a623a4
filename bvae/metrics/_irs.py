"""The interventional robustness score (Suter et al. 2019)."""

import numpy as np
from numpy.typing import ArrayLike

from bvae.errors import UsageError
from bvae.metrics import inputs


def irs(codes: ArrayLike, factors: ArrayLike, *, quantile: float = 0.99) -> float:
    """Whether a latent stays the same while its factor does, whatever all others do.

    For each value of a factor, how far a latent strays from its mean among the points with this value: the
    mean over values, over the latent's largest distance from its mean. A latent scores 1 minus the smallest
    of these over factors, and counts by that largest distance. From Suter et al. 2019, "Robustly disentangled
    causal mechanisms: validating deep representations for interventional robustness".

    Args:
        codes: [N, D] floats, the posterior means. factors: [N, K] integers.
        quantile: of the distances that is how far a latent strays; 1 is the paper's largest,
            disentanglement_lib's is 0.99.

    Returns:
        0 to 1; 0 if no latent varies.

    Raises:
        ValueError: other shapes or types, codes that are not finite, a factor without variation, or a
            quantile outside [0, 1].

    >>> import numpy as np
    >>> from bvae.metrics import irs
    >>> factors = np.indices((2, 2)).reshape(2, 4).T.repeat(50, 0)  # two independent bits
    >>> irs(factors.astype(float), factors)
    1.0
    """
    codes, factors = inputs.check(codes, factors)
    if not 0 <= quantile <= 1:
        raise UsageError(f"quantile must be 0 to 1, got {quantile}")
    codes = codes[:, codes.min(0) < codes.max(0)]
    if not codes.shape[1]:
        return 0.0
    largest = np.abs(codes - codes.mean(0)).max(0)
    strays = []
    for factor in factors.T:
        groups = [codes[factor == value] for value in range(factor.max() + 1)]
        away = [np.quantile(np.abs(group - group.mean(0)), quantile, axis=0) for group in groups]
        strays.append(np.mean(away, 0) / largest)
    return float(np.average(1 - np.min(strays, 0), weights=largest))
