"""The mutual information gap (Chen et al. 2018, section 4)."""

import numpy as np
from numpy.typing import ArrayLike

from bvae.metrics import inputs
from bvae.metrics.information import discretise, entropy, mutual_information


def mig(codes: ArrayLike, factors: ArrayLike, *, bins: int = 20) -> float:
    """The gap in mutual information between the best two latents of a factor, over the factor's entropy.

    From Chen et al. 2018, "Isolating sources of disentanglement in variational autoencoders". Even a perfect
    code scores below 1 for factors of more values than bins.

    Args:
        codes: [N, D] floats, the posterior means. factors: [N, K] integers.
        bins: of equal width, into which each latent's range is divided.

    Returns:
        The mean over factors: 0 (no latent has more information than all others) to 1.

    Raises:
        ValueError: other shapes or types, codes that are not finite, a factor without variation, fewer than
            2 bins, or fewer points than bins.

    >>> import numpy as np
    >>> from bvae.metrics import mig
    >>> factors = np.indices((2, 2)).reshape(2, 4).T.repeat(50, 0)  # two independent bits
    >>> round(mig(factors.astype(float), factors), 6)
    1.0
    >>> mixed = factors @ [[1, 1], [1, -1]]  # both latents have as much information about both
    >>> round(mig(mixed.astype(float), factors), 6)
    0.0
    """
    codes, factors = inputs.check(codes, factors)
    information = np.sort(mutual_information(discretise(codes, bins), factors), 0)
    return float(((information[-1] - information[-2]) / entropy(factors)).mean())
