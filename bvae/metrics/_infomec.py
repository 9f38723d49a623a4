"""InfoM, InfoC and InfoE (Hsu et al. 2023, section 4)."""

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from bvae.errors import UsageError
from bvae.metrics import inputs
from bvae.metrics.information import entropy

PRUNED = 20  # a latent is pruned if its range is less than the largest range over this


class InfoMEC(NamedTuple):
    """Three scores, and the matrix of the first two."""

    modularity: float  # InfoM: whether each latent has information about one factor
    compactness: float  # InfoC: whether one latent has the information about each factor
    explicitness: float  # InfoE: how much of the factors a linear classifier predicts
    information: NDArray[np.float64]  # [D, K], of latent and factor, as a share of the factor's entropy


def infomec(codes: ArrayLike, factors: ArrayLike, *, seed: int = 0, neighbors: int = 10) -> InfoMEC:
    """Modularity, compactness and explicitness from one normalised mutual information.

    Mutual information is estimated from nearest neighbours (Ross 2014), without bins. A latent's share is its
    largest information about a factor over the sum; InfoM is the mean over latents, scaled so that equal
    information about all factors gives 0. InfoC is the same over factors. Latents whose range is less than a
    twentieth of the largest are pruned. InfoE is 1 - the loss of an unpenalised logistic regression over that
    of one that sees no latent, on the points that it was fitted to. From Hsu et al. 2023, "Disentanglement
    via latent quantization".

    Args:
        codes: [N, D] floats, the posterior means. factors: [N, K] integers.
        seed: of the noise that the estimator adds to break ties.
        neighbors: of each point, for the mutual information.

    Returns:
        InfoM and InfoC, 0 to 1; a latent or factor without information counts 0, and so does a factor that
        has each value once; one latent that is left is as compact as can be. InfoE, at most 1; 0 is chance.
        The matrix [D, K], zeros for pruned latents.

    Raises:
        ValueError: other shapes or types, codes that are not finite, a factor without variation, or no
            neighbors.

    >>> import numpy as np
    >>> from bvae.metrics import infomec
    >>> factors = np.indices((2, 2)).reshape(2, 4).T.repeat(50, 0)  # two independent bits
    >>> [round(value, 1) for value in infomec(factors.astype(float), factors)[:3]]
    [1.0, 1.0, 1.0]
    """
    codes, factors = inputs.check(codes, factors)
    if neighbors < 1:
        raise UsageError(f"neighbors must be positive, got {neighbors}")
    ranges = np.ptp(codes, 0)
    active = ranges > ranges.max() / PRUNED
    information = np.zeros((codes.shape[1], factors.shape[1]))
    for k, factor in enumerate(factors.T):
        if active.any() and np.bincount(factor).max() > 1:  # else no point has a neighbour of its value
            information[active, k] = mutual_info_classif(
                codes[:, active], factor, discrete_features=False, n_neighbors=neighbors, random_state=seed
            )
    information /= entropy(factors)
    return InfoMEC(
        _concentration(information[active]),
        _concentration(information[active].T),
        float(np.mean([_predictable(codes, factor) for factor in factors.T])),
        information,
    )


def _concentration(shares: NDArray[np.float64]) -> float:
    """The mean over rows [R, C] of the largest over the sum, scaled so that C equal values give 0."""
    rows, columns = shares.shape
    total = shares.sum(1)
    if rows == 0 or columns == 0:
        return 0.0
    if columns == 1:
        return float((total > 0).mean())
    largest = np.where(total > 0, shares.max(1) / np.where(total > 0, total, 1), 1 / columns)
    return float((largest.mean() - 1 / columns) / (1 - 1 / columns))


def _predictable(codes: NDArray[np.floating], factor: NDArray[np.int64]) -> float:
    """The share of a factor's loss that its prediction from all latents saves; all values weigh the same."""
    deviation = codes.std(0)
    standard = (codes - codes.mean(0)) / np.where(deviation > 0, deviation, 1)
    model = LogisticRegression(C=np.inf, class_weight="balanced")  # 100 iterations, as in the paper's code
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # a factor that is predicted perfectly has no optimum
        model.fit(standard, factor)
    blind = np.log(len(model.classes_))  # balanced, and without a latent, all values are as likely
    return float(1 - log_loss(factor, model.predict_proba(standard)) / blind)
