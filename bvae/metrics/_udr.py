"""Unsupervised disentanglement ranking (Duan et al. 2020): a choice among models without labels."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.linear_model import Lasso

from bvae.errors import UsageError
from bvae.metrics.inputs import Codes, check_codes

Similarity = Literal["lasso", "spearman"]
ACTIVE_KL = 0.01  # nats; latents below it are left out
PENALTY = 0.1  # of the lasso


class UDR(NamedTuple):
    """Scores of models, and of pairs of them."""

    scores: NDArray[np.float64]  # [M], for each model the median over its pairs
    pairs: NDArray[np.float64]  # [M, M]: [i, j] compares model j with the latents of model i that predict it


def udr(
    codes: Sequence[ArrayLike], kl: Sequence[ArrayLike], *, similarity: Similarity = "lasso", seed: int = 0
) -> UDR:
    """How far models that were trained alike, but for the seed, agree in their latents.

    Disentangled models agree up to order and sign. Two models are compared by the matrix R of similarities of
    their active latents: the mean over each one's latents of (largest R)^2 / sum of R, averaged over both
    models. From Duan et al. 2020, "Unsupervised model selection for variational disentangled representation
    learning", in disentanglement_lib's form.

    Args:
        codes: of each model, [N, D] floats: the posterior means of the same images.
        kl: of each model, [D], nats: the mean KL of each latent.
        similarity: lasso is the absolute weights with which one model's latents predict those of the other,
            both standardised; spearman is the absolute rank correlation.
        seed: of the lasso, whose result hardly depends on it.

    Returns:
        The scores [M] and those of the pairs [M, M], each 0 to 1; a model without an active latent scores 0.

    Raises:
        ValueError: fewer than two models, other shapes, codes that are not finite, or another similarity.

    >>> import numpy as np
    >>> from bvae.metrics import udr
    >>> codes = np.random.default_rng(0).normal(size=(1000, 3))
    >>> udr([codes, -codes[:, [2, 0, 1]]], [np.ones(3)] * 2).scores.round(2)
    array([0.9, 0.9])
    """
    if similarity not in ("lasso", "spearman"):
        raise UsageError(f"similarity must be lasso or spearman, got {similarity!r}")
    if len(codes) != len(kl) or len(codes) < 2:
        raise UsageError(
            f"codes and kl must be of the same models, 2 or more, got {len(codes)} and {len(kl)}"
        )
    models = [
        _active(check_codes(each), np.asarray(nats, float)) for each, nats in zip(codes, kl, strict=True)
    ]
    if len({len(model) for model in models}) > 1:
        raise UsageError(f"codes must be of the same images, got {', '.join(str(len(m)) for m in models)}")
    m = len(models)
    pairs = np.zeros((m, m))
    for i in range(m):
        for j in range(m):
            if i != j and models[i].size and models[j].size:
                pairs[i, j] = agreement(_similarities(models[i], models[j], similarity, seed))
    others = ~np.eye(m, dtype=bool)
    return UDR(np.array([np.median(pairs[others[:, j], j]) for j in range(m)]), pairs)


def agreement(similarities: NDArray[np.float64]) -> float:
    """The score of a pair from its matrix of similarities."""

    def over(axis: int) -> float:
        total = similarities.sum(axis)
        return float((similarities.max(axis) ** 2 / np.where(total > 0, total, 1)).mean())

    return (over(0) + over(1)) / 2


def _active(codes: Codes, kl: NDArray[np.float64]) -> Codes:
    """The active latents, standardised."""
    if kl.shape != (codes.shape[1],):
        raise UsageError(f"kl must be [{codes.shape[1]}] for these codes, got {list(kl.shape)}")
    codes = codes[:, (kl > ACTIVE_KL) & (codes.std(0) > 0)]
    return (codes - codes.mean(0)) / codes.std(0)


def _similarities(first: Codes, second: Codes, kind: Similarity, seed: int) -> NDArray[np.float64]:
    """[latents of the first, latents of the second], 0 or more."""
    if kind == "lasso":
        fitted = Lasso(alpha=PENALTY, random_state=seed).fit(first, second)
        return np.abs(fitted.coef_.reshape(second.shape[1], first.shape[1]).T)
    ranks = [rankdata(codes, axis=0) for codes in (first, second)]
    a, b = ((r - r.mean(0)) / r.std(0) for r in ranks)
    return np.abs(a.T @ b) / len(a)
