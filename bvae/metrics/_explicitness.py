"""Explicitness (Ridgeway & Mozer 2018, section 3)."""

import numpy as np
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression

from bvae.metrics import inputs
from bvae.metrics._auroc import auroc


def explicitness(
    codes: ArrayLike, factors: ArrayLike, *, seed: int = 0, train: int = 10_000, test: int = 5_000
) -> float:
    """How well a linear classifier of all latents tells each value of a factor from the others.

    For each value, the area under the ROC curve of its predicted probability; the mean over a factor's
    values. From Ridgeway & Mozer 2018, "Learning deep disentangled embeddings with the f-statistic loss"; as
    in disentanglement_lib, latents are standardised and the classifier is scikit-learn's default.

    Args:
        codes: [N, D] floats, the posterior means. factors: [N, K] integers.
        seed: of the draw of points.
        train, test: points drawn; if there are fewer, two thirds and one third of them.

    Returns:
        The mean over factors: 0.5 (chance) to 1. Values that no test point, or all of them have are left out.

    Raises:
        ValueError: other shapes or types, codes that are not finite, a factor without variation, or sizes
            that are not positive.

    >>> import numpy as np
    >>> from bvae.metrics import explicitness
    >>> factors = np.indices((2, 2)).reshape(2, 4).T.repeat(50, 0)  # two independent bits
    >>> explicitness(factors.astype(float), factors)
    1.0
    """
    return explicitness_of(inputs.split(*inputs.check(codes, factors), train, test, seed))


def explicitness_of(data: inputs.Split) -> float:
    """`explicitness` of points that are split already."""
    mean, deviation = data.codes.mean(0), data.codes.std(0)
    deviation[deviation == 0] = 1
    fitted, tested = ((codes - mean) / deviation for codes in (data.codes, data.test_codes))
    return float(
        np.mean(
            [
                _area(LogisticRegression(max_iter=1000).fit(fitted, column), tested, test_column)
                for column, test_column in zip(data.factors.T, data.test_factors.T, strict=True)
            ]
        )
    )


def _area(classifier: LogisticRegression, codes: np.ndarray, factor: np.ndarray) -> float:
    """The mean over values of the area under the ROC curve; 0.5 if the factor does not vary."""
    probabilities = classifier.predict_proba(codes)
    present = factor[:, None] == classifier.classes_
    tested = present.any(0) & ~present.all(0)
    if not tested.any():
        return 0.5
    return float(np.diag(auroc(probabilities, present[:, tested].astype(int))[tested]).mean())
