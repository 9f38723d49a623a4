"""How well each latent alone predicts each attribute: for attributes that are not independent (CelebA's)."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from bvae.errors import UsageError
from bvae.metrics.inputs import check_codes


def auroc(codes: ArrayLike, attributes: ArrayLike) -> np.ndarray:
    """Area under the ROC curve of each latent for each attribute.

    It is the chance that an image with the attribute has a higher code than one without it; ties count half
    (Hanley & McNeil 1982, "The meaning and use of the area under a receiver operating characteristic curve").

    Args:
        codes: [N, D >= 2] floats.
        attributes: [N, K] of two values; the higher one means that the attribute is present.

    Returns:
        float64 [D, K], latent by attribute: 0.5 is chance; 1 (rises with the attribute) and 0 are perfect.

    Raises:
        ValueError: other shapes, codes that are not finite, or attributes without exactly two values.

    >>> from bvae.metrics import auroc
    >>> auroc([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]], [[-1], [1], [1]])
    array([[1. ],
           [0.5]])
    """
    codes, attributes = check_codes(codes), np.asarray(attributes)
    if attributes.ndim != 2 or len(attributes) != len(codes):
        raise UsageError(f"attributes must be [{len(codes)}, K], got {list(attributes.shape)}")
    for j, column in enumerate(attributes.T):
        if len(np.unique(column)) != 2:
            raise UsageError(f"attribute {j} has {len(np.unique(column))} values: it must have two")
    present = (attributes == attributes.max(0)).astype(np.float64)
    positive = present.sum(0)
    ranks = rankdata(codes, axis=0).T @ present  # the Mann-Whitney statistic
    return (ranks - positive * (positive + 1) / 2) / (positive * (len(codes) - positive))
