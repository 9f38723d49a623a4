"""The separated attribute predictability score (Kumar et al. 2018, section 3)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.svm import LinearSVC

from bvae.metrics import inputs


def sap(
    codes: ArrayLike, factors: ArrayLike, *, seed: int = 0, train: int = 10_000, test: int = 5_000
) -> float:
    """How much better the best single latent predicts a factor than the second best, in test accuracy.

    The predictor is a linear support vector machine, one latent at a time (Kumar et al. 2018, "Variational
    inference of disentangled latent concepts from unlabeled observations").

    Args:
        codes: [N, D] floats, the posterior means. factors: [N, K] integers.
        seed: of the draw of points.
        train, test: points drawn; if there are fewer, two thirds and one third of them.

    Returns:
        The mean over factors: 0 (no latent is better than all others) to 1.

    Raises:
        ValueError: other shapes or types, codes that are not finite, a factor without variation, or sizes
            that are not positive.

    >>> import numpy as np
    >>> from bvae.metrics import sap
    >>> factors = np.indices((2, 2)).reshape(2, 4).T.repeat(50, 0)  # two independent bits
    >>> round(sap(factors.astype(float), factors), 1)  # the other bit predicts it half the time
    0.5
    """
    return gap(accuracies(inputs.split(*inputs.check(codes, factors), train, test, seed)))


def accuracies(data: inputs.Split) -> NDArray[np.float64]:
    """The test accuracy with which each latent alone predicts each factor: [D, K]."""
    accuracy = np.zeros((data.codes.shape[1], data.factors.shape[1]))
    for latent in range(accuracy.shape[0]):
        fitted, tested = data.codes[:, [latent]], data.test_codes[:, [latent]]
        for k in range(accuracy.shape[1]):
            # The primal problem has the same optimum as the dual, and needs no random order.
            machine = LinearSVC(C=0.01, class_weight="balanced", dual=False).fit(fitted, data.factors[:, k])
            accuracy[latent, k] = machine.score(tested, data.test_factors[:, k])
    return accuracy


def gap(accuracy: NDArray[np.float64]) -> float:
    """The mean over factors of the difference between the two best latents, from accuracies [D, K]."""
    best = np.sort(accuracy, 0)
    return float((best[-1] - best[-2]).mean())
