"""Metrics on codes whose scores are known: perfect, rotated, noise, and small ones worked out by hand."""

import math

import numpy as np
import pytest
import torch
from deadlines import in_time
from sklearn.metrics import mutual_info_score, roc_auc_score

from bvae.metrics import (
    Grid,
    Table,
    active_units,
    auroc,
    beta_vae,
    dci,
    entropy_per_latent,
    factor_vae,
    gaussian_total_correlation,
    inputs,
    kl_per_latent,
    mig,
    modularity,
    reconstruction,
    sap,
    score,
)
from bvae.metrics._dci import _concentration
from bvae.metrics._sap import accuracies, gap
from bvae.metrics.information import discretise, entropy, mutual_information

SIZES = (2, 3, 4)
N = 1500
KEYS = {
    *("mig", "dci_disentanglement", "dci_completeness", "dci_informativeness", "sap", "modularity"),
    *("explicitness", "infom", "infoc", "infoe", "irs"),
}


def every_combination(sizes: tuple[int, ...], times: int = 1) -> np.ndarray:
    """Each combination of factors equally often, so that counts are probabilities."""
    return np.tile(np.indices(sizes).reshape(len(sizes), -1).T, (times, 1))


def rotation(n: int, seed: int = 3) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


@pytest.fixture(scope="module")
def factors() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(size, size=N) for size in SIZES], 1)


@pytest.fixture(scope="module")
def codes(factors) -> dict[str, np.ndarray]:
    """Codes [N, 3] from perfect to worthless."""
    unit = factors / (np.array(SIZES) - 1) - 0.5
    noise = np.random.default_rng(1).normal(size=unit.shape)
    return {"identity": unit, "rotated": (unit + 0.1 * noise) @ rotation(3), "noise": noise}


@pytest.fixture(scope="module")
def scores(codes, factors) -> dict[str, dict[str, float]]:
    return {name: score(code, factors) for name, code in codes.items()}


# --- score ------------------------------------------------------------------------------------------------
def test_the_identity_is_perfect(scores):
    assert scores["identity"].keys() == KEYS
    for name in ("dci_disentanglement", "dci_completeness", "dci_informativeness"):
        assert scores["identity"][name] == pytest.approx(1, abs=1e-6), name
    for name in ("mig", "modularity"):  # chance dependence between the factors that were drawn
        assert scores["identity"][name] == pytest.approx(1, abs=0.01), name


def test_noise_is_at_the_floor(scores):
    assert scores["noise"]["mig"] < 0.02
    assert scores["noise"]["sap"] < 0.03
    assert scores["noise"]["dci_disentanglement"] < 0.1
    assert scores["noise"]["dci_completeness"] < 0.1
    assert scores["noise"]["dci_informativeness"] == pytest.approx(np.mean([1 / s for s in SIZES]), abs=0.08)


def test_a_rotation_lies_between(scores):
    # A latent of noise can be as modular and as compact as one of two factors; a linear classifier undoes a
    # rotation.
    for name in KEYS - {"modularity", "infom", "infoc", "explicitness", "infoe"}:
        assert scores["noise"][name] + 0.02 < scores["rotated"][name] < scores["identity"][name] - 0.02, name
    assert scores["rotated"]["modularity"] < scores["identity"]["modularity"] - 0.02


def test_order_and_sign_of_latents_change_nothing(codes, factors, scores):
    other = score(codes["rotated"][:, [2, 0, 1]] * [1, -1, -1], factors)
    for name in KEYS:
        assert other[name] == pytest.approx(scores["rotated"][name], abs=0.03), name


def test_names_of_values_change_nothing(codes, factors, scores):
    renamed = np.array([7, -3, 100, 2])[factors]
    other = score(codes["rotated"], renamed.astype(np.int16))
    for name in KEYS:
        assert other[name] == pytest.approx(scores["rotated"][name], abs=0.02), name


def test_a_dead_latent_is_no_harm_and_no_help(codes, factors, scores):
    other = score(np.column_stack([codes["identity"], np.full(N, 0.3)]), factors)
    assert other["mig"] == pytest.approx(scores["identity"]["mig"])
    assert other["dci_disentanglement"] == pytest.approx(1, abs=1e-6)
    assert other["modularity"] == pytest.approx(scores["identity"]["modularity"] * 3 / 4)


def test_the_seed_draws_the_points(codes, factors):
    def short(seed: int) -> dict[str, float]:
        return score(codes["rotated"], factors, seed=seed, points=300, train=200, test=100)

    assert short(1) == short(1)
    assert short(1)["mig"] != short(2)["mig"]
    assert short(1)["sap"] != short(2)["sap"]


def test_each_metric_alone_gives_its_score(codes, factors):
    few = {"seed": 3, "train": 200, "test": 100}
    together = score(codes["rotated"], factors, **few)
    trees = dci(codes["rotated"], factors, **few)
    assert sap(codes["rotated"], factors, **few) == together["sap"]
    assert trees.disentanglement == together["dci_disentanglement"]
    assert trees.informativeness == together["dci_informativeness"]
    everything = np.random.default_rng(3).permutation(N)  # `score` takes all points here, in another order
    for metric in (mig, modularity):
        assert metric(codes["rotated"][everything], factors[everything]) == together[metric.__name__]


def nan(codes: np.ndarray) -> np.ndarray:
    codes = codes.copy()
    codes[5, 1] = np.nan
    return codes


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda z, f: (nan(z), f), r"codes\[5, 1\] is nan: codes must be finite"),
        (lambda z, f: (z[:, 0], f), r"codes must be \[N, D\]"),
        (lambda z, f: (z[:, :1], f), "at least 2 latents"),
        (lambda z, f: (z, f / 2), "factors must be integers"),
        (lambda z, f: (z, f[:, 0]), r"factors must be integers \[N, K\]"),
        (lambda z, f: (z[:100], f), "codes hold 100 points and factors 1500"),
        (lambda z, f: (z, f * [1, 0, 1]), "factor 1 has no variation in 1500 points"),
        (lambda z, f: (z[:19], f[:19]), "19 points are fewer than 20 bins"),
        (lambda z, f: (z[:0], f[:0]), "factor 0 has no variation in 0 points"),
    ],
)
def test_input_that_cannot_be_rated(codes, factors, harm, message):
    with pytest.raises(ValueError, match=message):
        score(*harm(codes["identity"], factors))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"bins": 1}, "bins must be at least 2"),
        ({"points": -5}, "points must be positive, got -5"),
        ({"train": 0}, "train and test must be positive"),
        ({"boosting": "fast"}, "boosting must be histogram or exact"),
    ],
)
def test_parameters_out_of_range(codes, factors, option, message):
    with pytest.raises(ValueError, match=message):
        score(codes["identity"], factors, **option)


# --- Closed forms -----------------------------------------------------------------------------------------
def test_a_latent_that_mixes_two_factors():
    """z0 knows all of f0 and half of f1 (ln 2 each), z1 the other half of f1."""
    f0, f1 = every_combination((2, 4), times=4).T
    codes, factors = np.column_stack([2 * f0 + f1 // 2, f1 % 2]), np.column_stack([f0, f1])
    assert mig(codes, factors) == pytest.approx((1 + 0) / 2)
    assert modularity(codes, factors) == pytest.approx((0 + 1) / 2)


def test_more_values_than_bins_cap_the_gap():
    """20 bins hold 12 pairs and 8 single values of 32: 12 / 16 ln 2 nats less than ln 32."""
    factors = every_combination((32, 2))
    counts = np.bincount(discretise(factors.astype(float))[:, 0])
    assert sorted(counts.tolist()) == [2] * 8 + [4] * 12
    expected = 1 - 24 / 32 * math.log(2) / math.log(32)
    assert mig(factors, factors) == pytest.approx((expected + 1) / 2)


def test_separated_attributes_of_two_bits():
    """A bit's own latent is always right, the other one half the time."""
    factors = every_combination((2, 2), times=50)
    data = inputs.Split(factors.astype(float), factors, factors.astype(float), factors)
    assert gap(accuracies(data)) == pytest.approx(0.5)


def test_mutual_information_is_scikit_learns(codes, factors):
    bins = discretise(codes["rotated"], 7)
    expected = [[mutual_info_score(bins[:, i], factors[:, j]) for j in range(3)] for i in range(3)]
    assert np.allclose(mutual_information(bins, factors), expected, atol=1e-6)
    assert np.allclose(entropy(every_combination(SIZES)), np.log(SIZES))


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        (np.eye(3)[[1, 2, 0]], 1),
        (np.ones((4, 3)) / 4, 0),
        (np.zeros((2, 2)), 0),
        ([[0.5, 0.5], [0, 0]], 0),
        ([[3, 0], [0.5, 0.5]], 0.75),  # rows of 1 and 0, weighted 3 to 1
        ([[0.25, 0.75], [0.25, 0.75]], 1 - (0.5 + 0.75 * math.log2(4 / 3))),
    ],
)
def test_concentration_of_importance(importance, expected):
    assert _concentration(np.array(importance, float)) == pytest.approx(expected)


def test_histogram_boosting_says_what_exact_boosting_says(codes, factors):
    fast, exact = (
        dci(codes["rotated"], factors, train=600, test=300, boosting=kind) for kind in ("histogram", "exact")
    )
    for name in ("disentanglement", "completeness", "informativeness"):
        assert getattr(fast, name) == pytest.approx(getattr(exact, name), abs=0.05), name
    assert np.abs(fast.importance - exact.importance).max() < 0.1
    assert np.allclose(fast.importance.sum(0), 1)


@pytest.mark.parametrize("boosting", ["histogram", "exact"])
def test_dci_of_duplicated_latents(boosting):
    """disentanglement_lib's case: each factor is in two latents, which are as good as each other."""
    factors = np.random.default_rng(0).integers(0, 4, (900, 5))
    codes = np.concatenate([factors, 7 - 2 * factors], 1).astype(float)
    found = dci(codes, factors, train=600, test=300, boosting=boosting)
    assert found.disentanglement > 0.97
    assert found.completeness == pytest.approx(1 - np.log(2) / np.log(10), abs=0.03)  # 0.70


# --- The two metrics that draw pairs ----------------------------------------------------------------------
FEW = {"train": 600, "test": 300}


def encoder(matrix: np.ndarray, noise: float = 0):
    rng = np.random.default_rng(5)

    def encode(indices: np.ndarray) -> np.ndarray:
        unit = indices / (np.array(SIZES) - 1) - 0.5
        return unit @ matrix + noise * rng.normal(size=(len(indices), matrix.shape[1]))

    return encode


@pytest.mark.parametrize("metric", [beta_vae, factor_vae])
def test_identity_order_sign_and_noise(metric):
    assert metric(encoder(np.eye(3)), Grid(SIZES), **FEW) > 0.99
    assert metric(encoder(-np.eye(3)[[2, 0, 1]]), Grid(SIZES), **FEW) > 0.99
    assert metric(encoder(np.zeros((3, 4)), noise=1), Grid(SIZES), **FEW) == pytest.approx(1 / 3, abs=0.1)


def test_factor_vaes_metric_sees_a_rotation():
    assert 0.4 < factor_vae(encoder(rotation(3), noise=0.2), Grid(SIZES), **FEW) < 0.95


def test_factor_vaes_metric_leaves_inactive_latents_out():
    """A latent that hardly moves would always vary least relative to its own noise in some group."""
    dead = np.column_stack([np.eye(3), np.zeros(3)])
    assert factor_vae(encoder(dead), Grid(SIZES), **FEW) > 0.99
    assert factor_vae(encoder(0.01 * np.eye(3)), Grid(SIZES), **FEW) == 0
    assert factor_vae(encoder(0.01 * np.eye(3)), Grid(SIZES), inactive=0.001, **FEW) > 0.99
    assert factor_vae(encoder(dead), Grid(SIZES), inactive=0, **FEW) > 0.99


@pytest.mark.parametrize("metric", [beta_vae, factor_vae])
def test_the_seed_draws_the_observations(metric):
    def rated(seed: int) -> float:
        return metric(encoder(rotation(3), noise=0), Grid(SIZES), seed=seed, train=100, test=500)

    assert rated(1) == rated(1)
    assert len({rated(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("metric", [beta_vae, factor_vae])
def test_encoders_and_sizes_that_cannot_be_used(metric):
    with pytest.raises(ValueError, match="codes must be finite"):
        metric(lambda x: x * np.nan, Grid(SIZES), **FEW)
    with pytest.raises(ValueError, match=r"codes must be \[N, D\]"):
        metric(lambda x: x[:, 0], Grid(SIZES), **FEW)
    with pytest.raises(ValueError, match="encode gave .* codes for"):
        metric(lambda x: x[1:], Grid(SIZES), **FEW)
    with pytest.raises(ValueError, match="positive"):
        metric(lambda x: x, Grid(SIZES), train=0)


def test_liblinear_is_one_factor_against_the_rest():
    """One latent of three factors puts them on a line, whose middle part no factor's line can cut out."""
    line = encoder(np.array([[0.6, 0.0], [1.0, 0.0], [0.15, 0.0]]))
    assert beta_vae(line, Grid(SIZES), pairs=512, **FEW) > 0.85
    assert beta_vae(line, Grid(SIZES), pairs=512, classifier="liblinear", **FEW) < 0.75
    assert beta_vae(encoder(np.eye(3)), Grid(SIZES), classifier="liblinear", **FEW) > 0.99
    with pytest.raises(ValueError, match="classifier must be multinomial or liblinear, got 'svm'"):
        beta_vae(line, Grid(SIZES), classifier="svm", **FEW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_straight_from_a_network(codes, factors, dtype):
    """With their gradient, and in a type that NumPy has not."""
    table = torch.tensor(codes["identity"], requires_grad=True).to(dtype)
    assert beta_vae(lambda rows: table[rows], Table(torch.from_numpy(factors)), **FEW) > 0.99
    given = score(table, torch.from_numpy(factors), boosting="histogram")
    assert given == score(table.detach().double().numpy(), factors)


def test_too_few_points_to_tell_factors_apart():
    with pytest.raises(ValueError, match="the 1 points to train on all share factor .: draw more"):
        beta_vae(encoder(np.eye(3)), Grid(SIZES), train=1, test=1)


@pytest.mark.parametrize("kind", ["grid", "table"])
def test_groups_agree_in_their_factor_alone(kind):
    rng = np.random.default_rng(0)
    table = every_combination(SIZES, times=2)
    sample = Grid(SIZES) if kind == "grid" else Table(table)
    shared = rng.integers(3, size=3000)
    drawn = sample(shared, 4, rng)
    drawn = (drawn if kind == "grid" else table[drawn]).reshape(3000, 4, 3)
    agree = (drawn == drawn[:, :1]).all(1)
    assert agree[np.arange(3000), shared].all()
    for k, size in enumerate(SIZES):
        others = agree[shared != k, k].mean()
        assert others == pytest.approx(size**-3, abs=0.03)
        assert np.allclose(np.bincount(drawn[:, 0, k]) / 3000, 1 / size, atol=0.04)


def test_a_table_of_a_users_own_codes(factors, codes):
    rows = factor_vae(lambda rows: codes["identity"][rows], Table(factors), **FEW)
    assert rows > 0.99
    with pytest.raises(ValueError, match="factors must be integers"):
        Table(factors / 2)
    with pytest.raises(ValueError, match="at least 2 factors"):
        Table(factors[:, :1])  # every group shares it: each metric would be 1
    constant = np.column_stack([factors, np.zeros(len(factors), int)])
    with pytest.raises(ValueError, match=f"factor {factors.shape[1]} has no variation"):
        Table(constant)
    with pytest.raises(ValueError, match="2 or more values"):
        Grid((3, 1))


# --- Posteriors, reconstructions, attributes --------------------------------------------------------------
def test_posteriors():
    mu = torch.tensor([[1.0, 0.0, 0.1], [-1.0, 0.0, -0.05]])
    log_var = torch.tensor([[0.0, 0.0, math.log(0.25)]]).expand(2, 3)
    expected = [0.5, 0, (0.01 + 0.0025) / 4 + 0.5 * (0.25 - 1) + math.log(2)]
    assert kl_per_latent(mu, log_var).tolist() == pytest.approx(expected, abs=1e-7)
    normal = 0.5 * math.log(2 * math.pi * math.e)
    assert entropy_per_latent(log_var).tolist() == pytest.approx([normal, normal, normal - math.log(2)])
    assert active_units(mu) == 2
    assert active_units(mu, threshold=0.1) == 1
    with pytest.raises(ValueError, match="must both be"):
        kl_per_latent(mu, log_var[:1])


@pytest.mark.parametrize("correlation", [0.0, 0.5, -0.9])
def test_total_correlation_of_two_gaussians(correlation):
    x = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    white = torch.linalg.qr(x - x.mean(0))[0]
    mix = [[1, correlation], [0, math.sqrt(1 - correlation**2)]]
    mixed = white @ torch.tensor(mix, dtype=torch.float64)
    expected = -0.5 * math.log(1 - correlation**2)
    scaled = mixed * torch.tensor([3, 100]) + 5
    assert gaussian_total_correlation(scaled) == pytest.approx(expected, abs=1e-9)
    assert gaussian_total_correlation(torch.column_stack([scaled, torch.ones(500)])) == pytest.approx(
        expected, abs=1e-9
    )


def test_latents_that_repeat_each_other_have_no_finite_total_correlation():
    x = torch.arange(10.0)[:, None]
    assert gaussian_total_correlation(torch.cat([x, x], 1)) == math.inf
    assert gaussian_total_correlation(torch.cat([x, 0 * x], 1)) == 0


def test_reconstructions():
    target = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]] * 3)
    found = reconstruction(target * 0.8 + 0.1, target, peak=1)
    assert found == pytest.approx((-4 * math.log(0.9), 0.01, 20))
    gaussian = reconstruction(target * 2 - 1.5, target * 2 - 1, peak=2, variance=0.5)
    assert gaussian == pytest.approx((4 * 0.25, 0.25, 20 * math.log10(2 / 0.5)))
    assert reconstruction(target, target, peak=1).psnr == math.inf
    for variance in (None, 0.5):
        with pytest.raises(ValueError, match="the decoder's output has values that are not finite"):
            reconstruction(target * math.nan, target, peak=1, variance=variance)
    with pytest.raises(ValueError, match="must be in .0, 1."):
        reconstruction(target - 1, target, peak=1)
    with pytest.raises(ValueError, match="the same shape"):
        reconstruction(target[:2], target, peak=1)


def test_area_under_the_curve_is_scikit_learns(codes, factors):
    rough = codes["rotated"].round(1)  # with ties
    attributes = (factors > 0) * 2 - 1
    expected = [[roc_auc_score(attributes[:, j], rough[:, i]) for j in range(3)] for i in range(3)]
    assert np.allclose(auroc(rough, attributes), expected)
    with pytest.raises(ValueError, match="attribute 1 has 3 values"):
        auroc(rough, factors)
    with pytest.raises(ValueError, match=r"attributes must be \[1500, K\]"):
        auroc(rough, attributes[:7])


@pytest.mark.slow
def test_the_full_protocol_on_the_factors_of_sprites():
    """20 bins cap the gap of a perfect code: they hold 40 values in pairs, and of 32 as above."""
    sizes = (3, 6, 40, 32, 32)
    grid = Grid(sizes)
    rng = np.random.default_rng(0)
    factors = grid(np.zeros(30_000, np.int64), 1, rng)
    unit = factors / (np.array(sizes) - 1)
    found = score(unit, factors)
    cap = np.mean([1, 1, math.log(20) / math.log(40)] + 2 * [1 - 24 / 32 * math.log(2) / math.log(32)])
    assert found["mig"] == pytest.approx(cap, abs=0.01)
    assert found["dci_disentanglement"] > 0.99
    assert found["modularity"] > 0.99
    assert beta_vae(lambda indices: indices / (np.array(sizes) - 1), grid) > 0.99
    assert factor_vae(lambda indices: indices / (np.array(sizes) - 1), grid) > 0.99


# --- large codes ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1e9, 1e100, 1e149])
def test_codes_of_any_scale_come_to_an_end(codes, factors, scale):
    """A linear classifier on 1e100 would not stop, and would hear no signal meanwhile."""
    rotated = codes["rotated"]
    sizes = {"train": 1000, "test": 500}
    unit = rotated / np.abs(rotated).max(0)
    large = unit * scale
    with in_time(20):
        assert score(large, factors, **sizes) == pytest.approx(score(unit, factors, **sizes), abs=0.01)
        table = Table(factors)
        found = beta_vae(large.__getitem__, table, **sizes)
        assert found == pytest.approx(beta_vae(unit.__getitem__, table, **sizes), abs=0.05)
        assert factor_vae(large.__getitem__, table, **sizes) == factor_vae(unit.__getitem__, table, **sizes)
        assert np.array_equal(auroc(large, np.sign(factors - 0.5)), auroc(unit, np.sign(factors - 0.5)))


def test_usual_codes_are_left_as_they_are(codes, factors):
    wide = codes["noise"] * 1e5
    assert np.array_equal(inputs.check(wide, factors)[0], wide)


def test_codes_whose_squares_are_infinite_are_refused(codes, factors):
    with pytest.raises(ValueError, match=r"codes must be at most 1e\+150, got \d.*e\+200: scale them"):
        score(codes["noise"] * 1e200, factors)
