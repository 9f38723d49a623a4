"""FactorVAE's metric (Kim & Mnih 2018, section 3)."""

import numpy as np

from bvae.errors import UsageError
from bvae.metrics.sampling import Encode, Sampler, groups


def factor_vae(
    encode: Encode,
    sample: Sampler,
    *,
    seed: int = 0,
    size: int = 64,
    train: int = 10_000,
    test: int = 5_000,
    variance_points: int = 10_000,
    inactive: float = 0.05,
    batch: int = 4096,
) -> float:
    """Accuracy with which the latent that varies least in a group predicts the factor that the group shares.

    Variances are divided by those of the whole data. The classifier is a vote: each latent predicts the
    factor that the training groups shared most often when this latent varied least. From Kim & Mnih 2018,
    "Disentangling by factorising".

    Args:
        encode: observations to posterior means [n, D].
        sample: draws the observations: a `Grid`, a `Table` or any other `Sampler`.
        seed: of the draws.
        size: observations in a group.
        train, test: groups.
        variance_points: observations for the variances of the whole data.
        inactive: latents with a smaller standard deviation are left out, and so are constant ones.
        batch: about how many observations `encode` gets per call.

    Returns:
        Test accuracy, 0 to 1; chance is 1 / number of factors. 0 if no latent is active.

    Raises:
        ValueError: sizes that are not positive, a single observation to take a variance of, or codes that
            are not finite [n, D].

    >>> from bvae.metrics import Grid, factor_vae
    >>> factor_vae(lambda indices: indices.astype(float), Grid([3, 4]), train=200, test=100)
    1.0
    """
    if min(size, variance_points) < 2 or min(train, test, batch) < 1:
        raise UsageError(
            "size and variance_points must be at least 2, train, test and batch positive: "
            f"{size}, {variance_points}, {train}, {test}, {batch}"
        )
    rng = np.random.default_rng(seed)
    alone = np.zeros(variance_points, np.int64)  # groups of one share nothing
    all_codes = np.concatenate([codes[:, 0] for codes in groups(encode, sample, alone, 1, rng, batch)])
    variance = all_codes.var(0, ddof=1)
    active = np.flatnonzero((np.sqrt(variance) >= inactive) & (variance > 0))
    if not len(active):
        return 0.0
    factor = rng.integers(sample.n_factors, size=train + test)
    batches = groups(encode, sample, factor, size, rng, batch)
    least = np.concatenate(
        [(codes[:, :, active].var(1, ddof=1) / variance[active]).argmin(1) for codes in batches]
    )
    votes = np.zeros((len(active), sample.n_factors), np.int64)
    np.add.at(votes, (least[:train], factor[:train]), 1)
    return float((votes.argmax(1)[least[train:]] == factor[train:]).mean())
