"""The total correlation: the reference against closed forms, bias, gradients, misuse."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from bvae import ops, reference

WEIGHTS = ["stratified", "weighted"]


def posteriors(batch: int, latents: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """z, mu, log_var `[B, D]` in float64, z a sample of each posterior."""
    generator = torch.Generator().manual_seed(seed)
    mu, log_var, eps = torch.randn(3, batch, latents, generator=generator, dtype=torch.float64)
    log_var = log_var - 1
    return mu + torch.exp(log_var / 2) * eps, mu, log_var


def mixture(mu: Tensor, log_var: Tensor) -> MixtureSameFamily:
    """The aggregate posterior of N images."""
    return MixtureSameFamily(
        Categorical(logits=torch.zeros(len(mu), dtype=mu.dtype)),
        Independent(Normal(mu, torch.exp(log_var / 2)), 1),
    )


# ---- closed forms ------------------------------------------------------------------------------------------


def test_one_latent_has_no_total_correlation():
    joint, product = reference.log_aggregate_posterior(*posteriors(9, 1), 50)
    assert torch.equal(joint, product)


@pytest.mark.parametrize("batch", [3, 8])
def test_identical_posteriors_give_their_own_density(batch):
    z, mu, log_var = posteriors(batch, 4)
    mu, log_var = mu[:1].expand(batch, -1), log_var[:1].expand(batch, -1)
    joint, product = reference.log_aggregate_posterior(z, mu, log_var, 1000)
    expected = Normal(mu, torch.exp(log_var / 2)).log_prob(z).sum(1)
    torch.testing.assert_close(joint, expected)
    torch.testing.assert_close(product, expected)


def test_the_whole_data_set_gives_the_exact_mixture():
    z, mu, log_var = posteriors(11, 3)
    joint, product = reference.log_aggregate_posterior(z, mu, log_var, 11)
    torch.testing.assert_close(joint, mixture(mu, log_var).log_prob(z))
    marginals = [mixture(mu[:, d, None], log_var[:, d, None]).log_prob(z[:, d, None]) for d in range(3)]
    torch.testing.assert_close(product, sum(marginals))


@pytest.mark.parametrize(("weights", "unbiased"), [("stratified", True), ("weighted", False)])
def test_the_density_is_unbiased_over_all_batches(weights, unbiased):
    """All batches of 3 of 7 images that hold the image whose z is asked for."""
    z, mu, log_var = posteriors(7, 2)
    exact = mixture(mu, log_var).log_prob(z).exp()
    for own in range(7):
        densities = []
        for others in itertools.combinations([i for i in range(7) if i != own], 2):
            index = torch.tensor([own, *others])
            joint, _ = reference.log_aggregate_posterior(z[index], mu[index], log_var[index], 7, weights)
            densities.append(joint[0].exp())
        mean = torch.stack(densities).mean()
        assert torch.isclose(mean, exact[own], rtol=1e-9) == unbiased


def test_linear_gaussian_codes():
    """Codes of covariance C and posteriors of variance v: q(z) is N(0, C + v I), whose TC is known.

    The mutual information, the total correlation and the dimension-wise KL add up to the exact KL.
    """
    n, v, correlation = 1500, 0.2, 0.8
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(2, n, 2, generator=generator, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.tensor([[1.0, correlation], [correlation, 1.0]]).double())
    mu = eps[0] @ factor.T
    log_var = torch.full_like(mu, math.log(v))
    z = mu + math.sqrt(v) * eps[1]
    joint, product = reference.log_aggregate_posterior(z, mu, log_var, n)
    expected = -0.5 * math.log(1 - (correlation / (1 + v)) ** 2)  # 0.29 nats
    assert (joint - product).mean().item() == pytest.approx(expected, abs=0.03)
    own = Normal(mu, math.sqrt(v)).log_prob(z).sum(1)
    prior = Normal(torch.zeros(2).double(), 1.0).log_prob(z).sum(1)
    mutual = 0.5 * (2 * math.log(1 + v) + math.log(1 - (correlation / (1 + v)) ** 2) - 2 * math.log(v))
    assert (own - joint).mean().item() == pytest.approx(mutual, abs=0.05)
    parts = (own - joint) + (joint - product) + (product - prior)
    assert parts.mean().item() == pytest.approx(ops.gaussian_kl(mu, log_var).mean().item(), abs=0.05)


def test_weighted_is_the_batch_mean_and_a_constant():
    """Some public codes take the mean over the batch: the weighted estimator without (D - 1) log N."""
    z, mu, log_var = posteriors(6, 4)
    each = Normal(mu, torch.exp(log_var / 2)).log_prob(z[:, None])  # [i, j, d]
    plain = (each.sum(2).logsumexp(1) - math.log(6)) - (each.logsumexp(1) - math.log(6)).sum(1)
    weighted = ops.total_correlation(z, mu, log_var, 900, weights="weighted")
    torch.testing.assert_close(weighted, plain.mean() + 3 * math.log(900))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradcheck(weights):
    tensors = [t.requires_grad_() for t in posteriors(4, 3)]
    assert torch.autograd.gradcheck(lambda *t: ops.log_aggregate_posterior(*t, 20, weights=weights), tensors)


# ---- the covariance ----------------------------------------------------------------------------------------


def test_the_covariance_penalty_is_that_of_torch_cov():
    _, mu, log_var = posteriors(9, 4)
    for spread in (None, log_var):
        covariance = torch.cov(mu.T, correction=0)
        if spread is not None:
            covariance = covariance + torch.diag(spread.exp().mean(0))
        expected = sum(
            5.0 * (covariance[i, i] - 1) ** 2 if i == j else 2.0 * covariance[i, j] ** 2
            for i in range(4)
            for j in range(4)
        )
        torch.testing.assert_close(reference.covariance_penalty(mu, spread, 2.0, 5.0), expected)


def test_codes_of_unit_covariance_cost_nothing():
    """I wants it of the means, II of the samples: means of variance 3/4 and posteriors of 1/4."""
    mu = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)))
    assert reference.covariance_penalty(mu, None, 2.0, 5.0).item() == pytest.approx(0, abs=1e-12)
    spread = torch.full_like(mu, math.log(0.25))
    assert reference.covariance_penalty(mu * math.sqrt(0.75), spread, 2.0, 5.0).item() < 1e-12
    assert reference.covariance_penalty(mu, spread, 2.0, 5.0).item() == pytest.approx(3 * 5 * 0.25**2)


# ---- arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_that_is_too_small_is_named(batch):
    with pytest.raises(ValueError, match=rf"total correlation of {batch} images .*at least 3"):
        ops.total_correlation(*posteriors(batch, 4), 100)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"dataset_size": 4},
            ValueError,
            "dataset_size must be the number of training images.*4 for a batch of 5",
        ),
        ({"dataset_size": 5.0}, TypeError, "dataset_size must be a Python int.*5.0"),
        ({"dataset_size": torch.tensor(9)}, TypeError, r"dataset_size must be a Python int.*int64 \[\]"),
        ({"weights": "equal"}, ValueError, "weights must be 'stratified' or 'weighted', got 'equal'"),
        ({"z": torch.zeros(5, 2)}, ValueError, r"z must have mu's shape \[5, 3\].*\[5, 2\]"),
        ({"z": torch.zeros(5, 3, device="meta")}, ValueError, "z must be on mu's device cpu.*meta"),
        ({"z": torch.zeros(5, 3, dtype=torch.int64)}, TypeError, "z must be float32.*int64"),
    ],
    ids=str,
)
def test_misuse_says_what_was_expected(change, error, message):
    z, mu, log_var = (t.float() for t in posteriors(5, 3))
    arguments = {"z": z, "mu": mu, "log_var": log_var, "dataset_size": 9, **change}
    with pytest.raises(error, match=message):
        ops.total_correlation(**arguments)


def test_images_of_latents_are_flattened():
    z, mu, log_var = posteriors(4, 12)
    flat = ops.total_correlation(z, mu, log_var, 9)
    shaped = ops.total_correlation(*(t.view(4, 3, 2, 2) for t in (z, mu, log_var)), 9)
    assert torch.equal(flat, shaped)
