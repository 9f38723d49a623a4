"""InfoMEC, explicitness, IRS, MIG on samples and UDR: closed forms and disentanglement_lib's cases."""

import json
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from test_metrics import every_combination, rotation
from torch import nn

from bvae.evaluation import agreement
from bvae.evaluation.options import Protocol
from bvae.ground_truth import Truth
from bvae.metrics import explicitness, infomec, inputs, irs, mig, mig_sampled, udr
from bvae.metrics._udr import agreement as agreement_of

FACTORS = every_combination((2, 3, 4), times=20)
CODES = FACTORS / [1, 2, 3] - 0.5
NOISE = np.random.default_rng(0).normal(size=CODES.shape)


def two_normals(distance: float) -> float:
    """I(z; v), nats: z is N(-distance / 2, 1) or N(distance / 2, 1), v says which."""

    def integrand(z: float) -> float:
        p = norm.pdf(z - distance / 2)
        return p * np.log(2 * p / (p + norm.pdf(z + distance / 2)))

    return quad(integrand, -12, 12)[0]


# --- InfoMEC ----------------------------------------------------------------------------------------------
def test_info_of_the_identity_and_of_its_double():
    found = infomec(CODES, FACTORS)
    assert found[:3] == pytest.approx((1, 1, 1), abs=0.02)
    assert found.information.argmax(0).tolist() == [0, 1, 2]
    double = infomec(np.column_stack([CODES, -2 * CODES]), FACTORS)
    assert double.modularity == pytest.approx(1, abs=0.02)
    assert double.compactness == pytest.approx((1 / 2 - 1 / 6) / (1 - 1 / 6), abs=0.02)


def test_info_of_one_latent_of_all_factors():
    """A latent that tells all three factors has the same share of each: InfoM 0, InfoC by rounding 1."""
    numbered = FACTORS @ [12, 4, 1] / 24.0
    codes = np.column_stack([numbered, np.full(len(FACTORS), 0.3)])
    found = infomec(codes, FACTORS)
    assert found.modularity == pytest.approx(0, abs=0.02)
    assert found.compactness == 1
    assert not found.information[1].any()


@pytest.mark.parametrize("distance", [1.0, 3.0])
def test_information_of_two_normals(distance):
    rng = np.random.default_rng(0)
    factors = rng.integers(2, size=(4000, 2))
    codes = distance * factors + rng.normal(size=factors.shape)
    shares = infomec(codes, factors).information
    expected = two_normals(distance) / math.log(2)
    assert np.allclose(shares, np.eye(2) * expected, atol=0.03)


def test_info_e_is_the_saved_loss():
    assert infomec(NOISE, FACTORS).explicitness == pytest.approx(0, abs=0.03)
    mixed = (CODES + 0.1 * NOISE) @ rotation(3)  # a linear classifier undoes a rotation
    assert infomec(mixed, FACTORS).explicitness > 0.7
    assert infomec(mixed, FACTORS).modularity < 0.6


@pytest.mark.filterwarnings("ignore:The number of unique classes")
def test_small_latents_are_pruned():
    small = np.column_stack([CODES, 0.04 * CODES[:, 0]])
    assert infomec(small, FACTORS)[:2] == pytest.approx(infomec(CODES, FACTORS)[:2], abs=1e-6)
    assert infomec(np.zeros((len(FACTORS), 2)), FACTORS)[:3] == pytest.approx((0, 0, 0), abs=1e-6)
    every_value_once = np.column_stack([np.arange(len(FACTORS)), FACTORS[:, 0]])
    assert not infomec(CODES, every_value_once).information[:, 0].any()
    with pytest.raises(ValueError, match="neighbors must be positive, got 0"):
        infomec(CODES, FACTORS, neighbors=0)


# --- Explicitness -----------------------------------------------------------------------------------------
def test_explicitness_from_perfect_to_chance():
    assert explicitness(CODES[:, [0, 1]], FACTORS[:, [0, 1]]) > 0.8
    assert explicitness(np.eye(24)[FACTORS @ [12, 4, 1]], FACTORS) == 1
    assert explicitness(NOISE, FACTORS) == pytest.approx(0.5, abs=0.06)


def test_explicitness_is_scikit_learns_area():
    noisy = CODES + 0.5 * NOISE
    data = inputs.split(*inputs.check(noisy, FACTORS), 10_000, 5_000, 0)
    mean, deviation = data.codes.mean(0), data.codes.std(0)
    areas = []
    for column, tested in zip(data.factors.T, data.test_factors.T, strict=True):
        classifier = LogisticRegression(max_iter=1000).fit((data.codes - mean) / deviation, column)
        predicted = classifier.predict_proba((data.test_codes - mean) / deviation)
        values = np.arange(column.max() + 1)
        areas.append(np.mean([roc_auc_score(tested == value, predicted[:, value]) for value in values]))
    assert explicitness(noisy, FACTORS) == pytest.approx(np.mean(areas))


# --- IRS --------------------------------------------------------------------------------------------------
def test_irs_of_disentanglement_libs_cases():
    rng = np.random.default_rng(0)
    factors = rng.integers(10, size=(3000, 10))
    assert irs(factors.astype(float), factors) == 1
    assert irs(np.zeros(factors.shape), factors) == 0
    constant = np.column_stack([factors, np.ones(3000), np.zeros(3000)]).astype(float)
    assert irs(constant, factors) == 1


def test_irs_by_hand():
    """z is a + b / 2 with bits a and b. While a stays, z strays by 1/4 of the 3/4 that it does in all."""
    bits = every_combination((2, 2))
    codes = np.column_stack([bits @ [1, 0.5], np.zeros(4)])
    assert irs(codes, bits, quantile=1) == pytest.approx(1 - 1 / 3)
    weighed = np.column_stack(
        [codes[:, 0], 0.1 * bits[:, 1]]
    )  # the second is perfect, and counts 0.05 of 0.8
    assert irs(weighed, bits, quantile=1) == pytest.approx((0.75 * 2 / 3 + 0.05) / 0.8)
    with pytest.raises(ValueError, match="quantile must be 0 to 1, got 2"):
        irs(codes, bits, quantile=2)


# --- MIG on samples ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("distance", [1.0, 3.0])
def test_sampled_gap_of_two_normals(distance):
    factors = every_combination((2, 2), times=500)
    mu = distance * factors.astype(float)
    found = mig_sampled(mu, np.zeros(mu.shape), factors)
    assert found == pytest.approx(two_normals(distance) / math.log(2), abs=0.03)


def test_sampled_gap_of_sharp_posteriors_is_the_one_of_codes():
    sharp = np.full(CODES.shape, -12.0)
    assert mig_sampled(CODES, sharp, FACTORS) == pytest.approx(1, abs=1e-6)
    double = np.column_stack([CODES, CODES])
    assert mig_sampled(double, np.full(double.shape, -12.0), FACTORS) == pytest.approx(0, abs=1e-3)
    assert mig_sampled(NOISE, np.full(CODES.shape, 2.0), FACTORS) < 0.02


def test_sampled_gap_sees_that_a_dead_latent_is_dead():
    """Its mean copies a factor, which 20 bins cannot tell from information."""
    mu = np.column_stack([CODES, 1e-3 * CODES[:, 2]])
    log_var = np.column_stack([np.full(CODES.shape, -12.0), np.zeros(len(mu))])
    assert mig(mu, FACTORS) < 0.7
    assert mig_sampled(mu, log_var, FACTORS) == pytest.approx(1, abs=1e-3)


def test_parts_of_the_samples_change_nothing(monkeypatch):
    log_var = np.full(CODES.shape, -1.0)
    whole = mig_sampled(CODES, log_var, FACTORS)
    monkeypatch.setattr("bvae.metrics._mig_sampled.PAIRS", 1000)
    assert mig_sampled(CODES, log_var, FACTORS) == pytest.approx(whole)
    assert mig_sampled(CODES, log_var, FACTORS, seed=1) != whole


def test_posteriors_that_cannot_be_rated():
    with pytest.raises(ValueError, match=r"must both be \[N, D\], got \[480, 3\] and \[480, 2\]"):
        mig_sampled(CODES, CODES[:, :2], FACTORS)
    with pytest.raises(ValueError, match="samples must be positive, got 0"):
        mig_sampled(CODES, CODES, FACTORS, samples=0)


# --- UDR --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("similarities", "expected"),
    [
        (np.eye(3), 1),
        ([[1, 1, 0], [1, 1, 0], [0, 0, 1]], 2 / 3),
        (np.ones((3, 3)), 1 / 3),
        (np.zeros((3, 3)), 0),
    ],
)
def test_agreement_in_disentanglement_libs_cases(similarities, expected):
    assert agreement_of(np.array(similarities, float)) == pytest.approx(expected)


@pytest.mark.parametrize("similarity", ["lasso", "spearman"])
def test_order_and_sign_of_latents_do_not_lower_udr(similarity):
    codes = np.random.default_rng(0).random((1000, 5))
    other = codes[:, [3, 1, 4, 0, 2]] * [1, -1, 1, -1, 1]
    scores = udr([codes, other, 7 * other + 3], [np.ones(5)] * 3, similarity=similarity).scores
    assert ((scores > 0.8) & (scores <= 1)).all()
    mixed = udr([codes, codes @ rotation(5)], [np.ones(5)] * 2, similarity=similarity).scores
    assert (mixed < 0.6).all()


def test_latents_of_low_kl_are_left_out():
    """disentanglement_lib's case: one latent is the same in both models, and the others are noise."""
    rng = np.random.default_rng(0)
    shared = rng.random((1000, 1))
    codes = [np.column_stack([shared, rng.random((1000, 9))]) for _ in range(2)]
    assert (udr(codes, [np.ones(10)] * 2).scores < 0.2).all()
    assert (udr(codes, [np.eye(10)[0]] * 2).scores > 0.8).all()
    assert udr(codes, [np.zeros(10)] * 2).scores.tolist() == [0, 0]


def test_models_of_other_sizes_and_a_stranger():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(1000, 4))
    alike = [codes, -codes, codes[:, [1, 0, 2, 3]], rng.normal(size=(1000, 3))]
    found = udr(alike, [np.ones(4)] * 3 + [np.ones(3)])
    assert (found.scores[:3] > 0.8).all()
    assert found.scores[3] < 0.1
    assert found.pairs.shape == (4, 4)
    for wrong, message in (
        (([codes], [np.ones(4)]), "2 or more, got 1 and 1"),
        (([codes, codes[:9]], [np.ones(4)] * 2), "of the same images, got 1000, 9"),
        (([codes, codes], [np.ones(4), np.ones(3)]), r"kl must be \[4\] for these codes, got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            udr(*wrong)
    with pytest.raises(ValueError, match="similarity must be lasso or spearman, got 'r'"):
        udr([codes, codes], [np.ones(4)] * 2, similarity="r")


def test_a_sweep_adds_udr_to_each_runs_scores(monkeypatch, tmp_path):
    codes = np.random.default_rng(0).normal(size=(200, 3))
    given = iter([codes, -codes])
    truth = Truth(("a",), np.zeros((200, 1), int), lambda numbers: None)
    monkeypatch.setattr(agreement.measure, "open_truth", lambda *arguments: truth)
    monkeypatch.setattr(agreement.measure, "encode", lambda *arguments: next(given))
    monkeypatch.setattr(agreement.BetaVAE, "from_pretrained", lambda run: nn.Identity())
    results = [{"scores": {}, "model": {"kl_per_latent": [1.0, 1.0, 0.0]}} for _ in range(2)]
    agreement.add_udr([tmp_path, tmp_path], results, Protocol(points=200), None)
    assert [result["scores"]["udr"]["mean"] > 0.8 for result in results] == [True, True]
    json.dumps(results)
