"""All metrics that need only codes and factors."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bvae.errors import UsageError
from bvae.metrics import inputs
from bvae.metrics._dci import Boosting, dci_of
from bvae.metrics._explicitness import explicitness_of
from bvae.metrics._infomec import infomec
from bvae.metrics._irs import irs
from bvae.metrics._mig import mig
from bvae.metrics._modularity import modularity
from bvae.metrics._sap import accuracies, gap


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
    """Measure codes against the factors of their images, with all metrics that need no encoder.

    Sizes are those of Locatello et al. 2019, "Challenging common assumptions in the unsupervised learning of
    disentangled representations". DCI, SAP and explicitness use the same points, which are also those of each
    called alone with the same seed.

    Args:
        codes: [N, D] floats, one row per image: the posterior means.
        factors: [N, K] integers, the same rows.
        seed: of the draw of points and of the trees.
        points: drawn for MIG, modularity, InfoMEC and IRS; all, if there are fewer.
        train, test: drawn for DCI, SAP and explicitness; if there are fewer points, two thirds and one third
            of them.
        bins: per latent, for MIG and modularity.
        boosting: of DCI; see `dci`.

    Returns:
        mig, dci_disentanglement, dci_completeness, dci_informativeness, sap, modularity, explicitness, infom,
        infoc, infoe and irs, each at most 1.

    Raises:
        ValueError: other shapes or types, codes that are not finite, a factor without variation, fewer
            points than bins, a parameter out of its range.

    >>> import numpy as np
    >>> from bvae.metrics import score
    >>> factors = np.indices((2, 2)).reshape(2, 4).T.repeat(50, 0)  # two independent bits
    >>> {name: round(value, 1) for name, value in score(factors.astype(float), factors).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'mig': 1.0, 'dci_disentanglement': 1.0, 'dci_completeness': 1.0, 'dci_informativeness': 1.0,
     'sap': 0.5, 'modularity': 1.0, 'explicitness': 1.0, 'infom': 1.0, 'infoc': 1.0, 'infoe': 1.0, 'irs': 1.0}
    """
    return measure(codes, factors, seed, points, train, test, bins, boosting)[0]


def measure(
    codes: ArrayLike,
    factors: ArrayLike,
    seed: int,
    points: int,
    train: int,
    test: int,
    bins: int,
    boosting: Boosting,
    active: NDArray[np.bool_] | None = None,
) -> tuple[dict[str, float], NDArray[np.float64]]:
    """`score`, and the importance matrix [D, K] of its trees.

    Args:
        active: [D]. If it leaves out some latents and keeps two, mig_active, sap_active and
            modularity_active are those scores of the others alone. A nearly constant latent, stretched over
            the bins, looks informative; the trees hardly use it, so DCI needs no such score.
    """
    if points < 1:
        raise UsageError(f"points must be positive, got {points}")
    codes, factors = inputs.check(codes, factors)
    drawn = np.random.default_rng(seed).permutation(len(codes))[:points]
    data = inputs.split(codes, factors, train, test, seed)
    points_codes, points_factors = codes[drawn], factors[drawn]
    mig_all = mig(points_codes, points_factors, bins=bins)  # before the slow trees, because it checks bins
    trees = dci_of(data, boosting, seed)
    accuracy = accuracies(data)
    info = infomec(points_codes, points_factors, seed=seed)
    scores = {
        "mig": mig_all,
        "dci_disentanglement": trees.disentanglement,
        "dci_completeness": trees.completeness,
        "dci_informativeness": trees.informativeness,
        "sap": gap(accuracy),
        "modularity": modularity(points_codes, points_factors, bins=bins),
        "explicitness": explicitness_of(data),
        "infom": info.modularity,
        "infoc": info.compactness,
        "infoe": info.explicitness,
        "irs": irs(points_codes, points_factors),
    }
    if active is not None and 2 <= active.sum() < len(active):
        scores["mig_active"] = mig(points_codes[:, active], points_factors, bins=bins)
        scores["sap_active"] = gap(accuracy[active])
        scores["modularity_active"] = modularity(points_codes[:, active], points_factors, bins=bins)
    return scores, trees.importance
