"""Check the codes and factors for the metrics, and split them for training and testing."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bvae.errors import UsageError

LARGE = 1e6  # larger codes are scaled down: linear classifiers never come to an end on 1e100
LARGEST = 1e150  # of a code: its square is finite

Codes = NDArray[np.floating]  # [N, D]
Factors = NDArray[np.int64]  # [N, K], each column 0, 1, ... without gaps


class Split(NamedTuple):
    """Points to fit an estimator on, and points to test it on."""

    codes: Codes
    factors: Factors
    test_codes: Codes
    test_factors: Factors


def check(codes: ArrayLike, factors: ArrayLike) -> tuple[Codes, Factors]:
    """Codes [N, D >= 2] as float64, and factors [N, K >= 2] with their values renumbered from 0.

    Large codes are scaled, as by `scale_down`.

    Raises:
        ValueError: another shape or type, codes that are not finite, or a factor that does not vary.
    """
    codes, factors = check_codes(codes), check_factors(factors)
    if len(codes) != len(factors):
        raise UsageError(f"codes hold {len(codes)} points and factors {len(factors)}: they must be the same")
    renumbered = np.stack([np.unique(column, return_inverse=True)[1] for column in factors.T], 1)
    check_variation(renumbered)
    return scale_down(codes), renumbered


def scale_down(codes: Codes) -> Codes:
    """The codes [N, D]; those of a latent that exceeds 1e6 are divided by the largest of them."""
    largest = np.abs(codes).max(0, initial=0)
    return codes / np.where(largest > LARGE, largest, 1)


def check_codes(codes: ArrayLike) -> Codes:
    """Codes [N, D >= 2] as float64, from an array or a tensor on any device, with a gradient or without.

    Raises:
        ValueError: another shape, or values that are not finite or beyond 1e150.
    """
    codes = _array(codes).astype(np.float64)
    if codes.ndim != 2 or codes.shape[1] < 2:
        raise UsageError(f"codes must be [N, D] of at least 2 latents, got {list(codes.shape)}")
    if not np.isfinite(codes).all():
        row, latent = np.argwhere(~np.isfinite(codes))[0]
        raise UsageError(f"codes[{row}, {latent}] is {codes[row, latent]}: codes must be finite")
    if (largest := np.abs(codes).max(initial=0)) > LARGEST:
        raise UsageError(f"codes must be at most {LARGEST:g}, got {largest:.4g}: scale them")
    return codes


def check_factors(factors: ArrayLike) -> NDArray[np.integer]:
    """Factors [N, K >= 2], unchanged.

    Raises:
        ValueError: another shape or type.
    """
    factors = _array(factors)
    if factors.ndim != 2 or factors.dtype.kind not in "iu" or factors.shape[1] < 2:
        raise UsageError(
            "factors must be integers [N, K] of at least 2 factors, "
            f"got {factors.dtype} {list(factors.shape)}; continuous ones need bins"
        )
    return factors


def check_variation(factors: NDArray[np.integer]) -> None:
    """Raise ValueError for a factor that has one value only: nothing can be learned about it."""
    for k, column in enumerate(factors.T):
        if len(column) == 0 or column.min() == column.max():
            raise UsageError(
                f"factor {k} has no variation in {len(column)} points: leave it out or add points"
            )


def split(codes: Codes, factors: Factors, train: int, test: int, seed: int) -> Split:
    """`train` and `test` points at random; if there are fewer points, two thirds and one third of them.

    Args:
        codes, factors: as `check` returns them.
        seed: of the draw: the same points for every metric.

    Raises:
        ValueError: a size that is not positive, or too few points for a factor to vary.
    """
    if train < 1 or test < 1:
        raise UsageError(f"train and test must be positive numbers of points, got {train} and {test}")
    n = len(codes)
    rng = np.random.default_rng(seed)
    rng.permutation(n)  # the order in which `score` draws the points of the other metrics
    if n < train + test:
        train = n * 2 // 3
        test = n - train
    first, second = np.split(rng.permutation(n)[: train + test], [train])
    check_variation(factors[first])
    return Split(codes[first], factors[first], codes[second], factors[second])


def _array(values: ArrayLike) -> np.ndarray:
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
