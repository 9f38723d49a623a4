"""Modularity (Ridgeway & Mozer 2018, section 3)."""

import numpy as np
from numpy.typing import ArrayLike

from bvae.metrics import inputs
from bvae.metrics.information import discretise, mutual_information


def modularity(codes: ArrayLike, factors: ArrayLike, *, bins: int = 20) -> float:
    """Whether each latent has information about one factor only.

    A latent whose mutual information with the factors is m scores
    1 - sum of the other m^2 / (largest m^2 (K - 1)); one without information scores 0. From Ridgeway & Mozer
    2018, "Learning deep disentangled embeddings with the f-statistic loss".

    Args:
        codes: [N, D] floats, the posterior means. factors: [N, K] integers.
        bins: of equal width, into which each latent's range is divided.

    Returns:
        The mean over latents: 0 (the same information about every factor, or none) to 1.

    Raises:
        ValueError: other shapes or types, codes that are not finite, a factor without variation, fewer than
            2 bins, or fewer points than bins.

    >>> import numpy as np
    >>> from bvae.metrics import modularity
    >>> factors = np.indices((2, 2)).reshape(2, 4).T.repeat(50, 0)  # two independent bits
    >>> codes = np.column_stack([factors[:, 0], factors.sum(1)]).astype(float)
    >>> round(modularity(codes, factors), 6)  # the first latent encodes one factor, the second both
    0.5
    """
    codes, factors = inputs.check(codes, factors)
    squared = mutual_information(discretise(codes, bins), factors) ** 2
    largest = squared.max(1)
    others = squared.sum(1) - largest
    share = others / np.where(largest > 0, largest * (factors.shape[1] - 1), 1)
    return float(np.where(largest > 0, 1 - share, 0).mean())
