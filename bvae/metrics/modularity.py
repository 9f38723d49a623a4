"""Modularity (Ridgeway & Mozer 2018, section 3)."""

import numpy as np
from numpy.typing import ArrayLike

from bvae.metrics import inputs
from bvae.metrics.information import discretise, mutual_information


def modularity(codes: ArrayLike, factors: ArrayLike, bins: int = 20) -> float:
    """Whether each latent knows of one factor only: the mean over latents, 0 to 1.

    A latent whose mutual information with the factors is m scores
    1 - sum of the other m^2 / (largest m^2 (K - 1)); one that knows nothing scores 0.

    Args:
        codes: [N, D] floats. factors: [N, K] integers.

    Raises:
        ValueError: input that `inputs.check` refuses, or fewer points than bins.
    """
    codes, factors = inputs.check(codes, factors)
    squared = mutual_information(discretise(codes, bins), factors) ** 2
    largest = squared.max(1)
    others = squared.sum(1) - largest
    share = others / np.where(largest > 0, largest * (factors.shape[1] - 1), 1)
    return float(np.where(largest > 0, 1 - share, 0).mean())
