"""The metrics that need nothing but codes and factors, together."""

import numpy as np
from numpy.typing import ArrayLike

from bvae.metrics import inputs
from bvae.metrics.dci import Boosting, dci
from bvae.metrics.mig import mig
from bvae.metrics.modularity import modularity
from bvae.metrics.sap import sap


def score(
    codes: ArrayLike,
    factors: ArrayLike,
    *,
    seed: int = 0,
    points: int = 10_000,
    train: int = 10_000,
    test: int = 5_000,
    bins: int = 20,
    boosting: Boosting = "histogram",
) -> dict[str, float]:
    """Rate codes [N, D] by the factors [N, K] that their images were made from.

    Args:
        codes: floats, one row an image: the posterior means.
        factors: integers, the same rows.
        seed: of the draw of points and of the trees.
        points: drawn for MIG and modularity; all, if there are fewer.
        train, test: drawn for DCI and SAP; of fewer points, two thirds and one third.
        bins: a latent, for MIG and modularity.
        boosting: of DCI; see `dci`.

    Returns:
        mig, dci_disentanglement, dci_completeness, dci_informativeness, sap and modularity, each 0 to 1.

    Raises:
        ValueError: other shapes or types, codes that are not finite, a factor without variation, fewer
            points than bins, a parameter out of its range.
    """
    if points < 1:
        raise ValueError(f"points must be positive, got {points}")
    codes, factors = inputs.check(codes, factors)
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(codes))[:points]
    data = inputs.split(codes, factors, train, test, rng)
    gap = mig(codes[drawn], factors[drawn], bins)
    module = modularity(codes[drawn], factors[drawn], bins)
    trees = dci(data, boosting, seed)
    return {
        "mig": gap,
        "dci_disentanglement": trees.disentanglement,
        "dci_completeness": trees.completeness,
        "dci_informativeness": trees.informativeness,
        "sap": sap(data),
        "modularity": module,
    }
