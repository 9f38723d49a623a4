"""Mutual information between latents and factors, from counts; all in nats."""

import numpy as np

from bvae.errors import UsageError
from bvae.metrics.inputs import Codes, Factors

ROUNDING = 1e-12  # nats; the rounding error of a difference of entropies


def discretise(codes: Codes, bins: int = 20) -> Factors:
    """Each latent's range in bins of equal width: [N, D] of 0 to bins - 1.

    Raises:
        ValueError: fewer than 2 bins, or fewer points than bins.
    """
    if bins < 2:
        raise UsageError(f"bins must be at least 2, got {bins}")
    if len(codes) < bins:
        raise UsageError(f"{len(codes)} points are fewer than {bins} bins: use more points or fewer bins")
    low, high = codes.min(0), codes.max(0)
    width = np.where(high > low, high - low, 1)
    return np.minimum((codes - low) / width * bins, bins - 1).astype(np.int64)


def mutual_information(a: Factors, b: Factors) -> np.ndarray:
    """I(a_i; b_j) of all pairs of columns of integers from 0, [N, D] and [N, K]: [D, K].

    One product of indicator matrices counts all pairs of values at once.
    """
    n = len(a)
    hot_a, start_a = _indicators(a)
    hot_b, start_b = _indicators(b)
    counts = (hot_a.T @ hot_b).astype(np.float64)  # [values of a, values of b]
    joint = _entropy_terms(counts / n)
    joint = np.add.reduceat(np.add.reduceat(joint, start_a, 0), start_b, 1)
    information = entropy(a)[:, None] + entropy(b) - joint
    return np.where(information > ROUNDING, information, 0)


def entropy(a: Factors) -> np.ndarray:
    """H(a_i) of columns of integers from 0, [N, D]: [D]."""
    hot, start = _indicators(a)
    return np.add.reduceat(_entropy_terms(hot.mean(0, dtype=np.float64)), start)


def _indicators(a: Factors) -> tuple[np.ndarray, np.ndarray]:
    """[N, values of all columns] of 0 and 1, and where each column's values start."""
    sizes = a.max(0) + 1
    start = np.cumsum(sizes) - sizes
    hot = np.zeros((len(a), sizes.sum()), np.float32)  # counts up to 2^24 are exact
    np.put_along_axis(hot, a + start, 1, 1)
    return hot, start


def _entropy_terms(p: np.ndarray) -> np.ndarray:
    return -p * np.log(np.where(p > 0, p, 1))
