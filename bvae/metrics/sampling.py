"""Draw groups of observations that agree in a factor."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bvae.errors import UsageError
from bvae.metrics.inputs import Codes, check_codes, check_factors, check_variation

Encode = Callable[[Any], ArrayLike]  # n observations to codes [n, D], the posterior means


class Sampler(Protocol):
    """Draws groups of observations; those in a group agree in one factor, and are independent otherwise."""

    n_factors: int

    def __call__(self, shared: NDArray[np.int64], size: int, rng: np.random.Generator) -> Any:
        """G groups of `size` observations, [G * size, ...] group by group; group g agrees in `shared[g]`."""


class Grid:
    """Independent, uniform factors of given sizes; an observation is its row of indices [K].

    Raises:
        ValueError: fewer than 2 factors, or a factor of fewer than 2 values.

    >>> import numpy as np
    >>> from bvae.metrics import Grid
    >>> drawn = Grid([3, 4])(np.array([0, 0, 1]), 5, np.random.default_rng(0))  # three groups of five
    >>> drawn.shape, len(set(drawn[10:, 1].tolist()))  # the last group agrees in factor 1
    ((15, 2), 1)
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if len(sizes) < 2 or min(sizes) < 2:
            raise UsageError(f"sizes must be 2 or more factors of 2 or more values each, got {list(sizes)}")
        self._sizes = np.array(sizes)
        self.n_factors = len(sizes)

    def __call__(self, shared: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.int64]:
        drawn = rng.integers(self._sizes, size=(len(shared), size, self.n_factors))
        group = np.arange(len(shared))
        drawn[group, :, shared] = drawn[group, 0, shared][:, None]
        return drawn.reshape(-1, self.n_factors)


class Table:
    """A data set with its factors, integers [N, K >= 2]; an observation is the number of its row.

    Raises:
        ValueError: another shape or type, or a factor that does not vary: all groups agree in it.

    >>> import numpy as np
    >>> from bvae.metrics import Table
    >>> factors = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    >>> rows = Table(factors)(np.array([1]), 5, np.random.default_rng(0))  # five that agree in factor 1
    >>> len(set(factors[rows, 1].tolist()))
    1
    """

    def __init__(self, factors: ArrayLike) -> None:
        factors = check_factors(factors)
        check_variation(factors)
        self.n_factors = factors.shape[1]
        self._order = np.argsort(factors, 0)  # equal values lie together
        ordered = np.take_along_axis(factors, self._order, 0)
        # For each position in that order: the start and the end of the range with the same value.
        columns = ordered.T
        self._start = np.stack([np.searchsorted(c, c, "left") for c in columns], 1)
        self._end = np.stack([np.searchsorted(c, c, "right") for c in columns], 1)

    def __call__(self, shared: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.int64]:
        position = rng.integers(len(self._order), size=len(shared))
        start, end = self._start[position, shared], self._end[position, shared]
        drawn = rng.integers(start[:, None], end[:, None], size=(len(shared), size))
        return self._order[drawn, shared[:, None]].reshape(-1)


def groups(
    encode: Encode,
    sample: Sampler,
    shared: NDArray[np.int64],
    size: int,
    rng: np.random.Generator,
    batch: int,
) -> Iterator[Codes]:
    """Codes of the groups, [groups of the batch, size, D] at a time, about `batch` observations each.

    Raises:
        ValueError: codes that are not [observations, D], or not finite.
    """
    count = max(1, batch // size)
    for at in range(0, len(shared), count):
        part = shared[at : at + count]
        codes = check_codes(encode(sample(part, size, rng)))
        if len(codes) != len(part) * size:
            raise UsageError(f"encode gave {len(codes)} codes for {len(part) * size} observations")
        yield codes.reshape(len(part), size, -1)
