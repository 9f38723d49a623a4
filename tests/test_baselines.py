"""What codes without training score on 2D shapes: the bars that the paper's table sets."""

import numpy as np
import pytest
import torch

from bvae.evaluation import baselines
from bvae.evaluation.baselines import ALL, INTERPOLATED, PAPER, Sharing, measure
from bvae.pipelines import sprites


@pytest.mark.slow
def test_few_points():
    scores = measure(points=100, seeds=(0, 1))
    assert scores.keys() == PAPER.keys()
    for name, of in scores.items():
        assert of.keys() == {ALL, INTERPOLATED}
        assert all(0.1 < value <= 1 for values in of.values() for value in values), name
    assert min(scores["ground truth"][ALL]) > 0.95
    assert max(scores["untrained VAE"][ALL]) < min(scores["PCA"][ALL])
    assert max(scores["PCA"][ALL]) < min(scores["ground truth"][ALL])
    again = measure(points=100, seeds=(1,))
    assert all(again[name][which] == of[which][1:] for name, of in scores.items() for which in of)


def test_codes():
    indices = sprites.unravel(torch.arange(0, sprites.COUNT, 1999))
    made = baselines.codes(sprites.render(indices), indices.numpy(), seed=0)
    found = {name: make() for name, make in made.items()}
    assert {name: code.shape[1] for name, code in found.items()} == {
        **dict.fromkeys(PAPER, 10),
        "ground truth": 5,
        "raw pixels": 4096,
    }
    pca = np.cov(found["PCA"].T)
    assert np.abs(pca - np.diag(np.diag(pca))).max() < 1e-3 * pca.max()
    assert (np.diff(np.diag(pca)) < 0).all()
    assert np.cov(found["ICA, standardised pixels"].T) == pytest.approx(np.eye(10), abs=0.01)


def test_pairs_share_a_chosen_factor():
    factors = np.indices((3, 4, 5)).reshape(3, -1).T
    sharing = Sharing(factors, (1, 2))
    assert sharing.n_factors == 2
    rng = np.random.default_rng(0)
    for shared, column in ((0, 1), (1, 2)):
        pairs = factors[sharing(np.full(500, shared), 2, rng)].reshape(500, 2, 3)
        agree = (pairs[:, 0] == pairs[:, 1]).mean(0)
        assert agree[column] == 1
        assert (np.delete(agree, column) < 0.5).all()


@pytest.mark.slow
def test_ground_truth_and_pca_are_the_papers():
    scores = measure(points=3000, seeds=(0, 1))
    mean = {name: {which: np.mean(values) for which, values in of.items()} for name, of in scores.items()}
    assert min(mean["ground truth"].values()) > 0.995
    assert 100 * mean["PCA, standardised pixels"][INTERPOLATED] == pytest.approx(84.9, abs=5)
    assert mean["raw pixels"][ALL] < mean["PCA"][ALL] < mean["ground truth"][ALL]
