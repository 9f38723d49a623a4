"""The mutual information gap (Chen et al. 2018, section 4)."""

import numpy as np
from numpy.typing import ArrayLike

from bvae.metrics import inputs
from bvae.metrics.information import discretise, entropy, mutual_information


def mig(codes: ArrayLike, factors: ArrayLike, bins: int = 20) -> float:
    """How much more the best latent knows of a factor than the second best, over the factor's entropy.

    The mean over factors, 0 to 1. Latents are cut into equal bins, so that even a perfect code scores below 1
    for factors of more values than bins.

    Args:
        codes: [N, D] floats. factors: [N, K] integers.

    Raises:
        ValueError: input that `inputs.check` refuses, or fewer points than bins.
    """
    codes, factors = inputs.check(codes, factors)
    information = np.sort(mutual_information(discretise(codes, bins), factors), 0)
    return float(((information[-1] - information[-2]) / entropy(factors)).mean())
