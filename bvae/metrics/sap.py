"""The separated attribute predictability score (Kumar et al. 2018, section 3)."""

import numpy as np
from sklearn.svm import LinearSVC

from bvae.metrics.inputs import Split


def sap(data: Split) -> float:
    """How much better the best single latent predicts a factor than the second best, in test accuracy.

    The mean over factors, 0 to 1. The predictor is a linear support vector machine, one latent at a time.
    """
    accuracy = np.zeros((data.codes.shape[1], data.factors.shape[1]))
    for latent in range(accuracy.shape[0]):
        fitted, tested = data.codes[:, [latent]], data.test_codes[:, [latent]]
        for k in range(accuracy.shape[1]):
            # The primal problem has the dual's optimum, and needs no random order to find it.
            machine = LinearSVC(C=0.01, class_weight="balanced", dual=False).fit(fitted, data.factors[:, k])
            accuracy[latent, k] = machine.score(tested, data.test_factors[:, k])
    accuracy.sort(0)
    return float((accuracy[-1] - accuracy[-2]).mean())
