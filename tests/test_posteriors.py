"""reparam_kl and gaussian_kl: posteriors in other forms, priors, free bits, generators, several draws."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from bvae import ops

B, D = 4, 3


def leaf(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device).requires_grad_()


FORMS = {
    "std": lambda mu, std: ((mu,), {"std": std}),
    "log_var": lambda mu, std: ((mu, 2 * std.log()), {}),
    "Normal": lambda mu, std: ((Normal(mu, std),), {}),
    "Independent": lambda mu, std: ((Independent(Normal(mu, std), 1),), {}),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", [(B, D), (D,), (B, 1), ()], ids=str)
def test_every_form_of_a_posterior_is_torchs(backend, form, shape):
    mu, raw = leaf(B, D, device=backend), leaf(*shape, seed=1, device=backend)
    args, options = form(mu, F.softplus(raw))
    z, kl = ops.reparam_kl(*args, seed=3, **options)
    posterior = Normal(mu, F.softplus(raw))
    eps = ops.reparam_kl(torch.zeros(B, D, device=backend), 0.0, seed=3)[0]
    expected = posterior.loc + posterior.scale * eps
    expected_kl = kl_divergence(posterior, Normal(torch.zeros_like(mu), 1.0)).sum(1)
    torch.testing.assert_close((z, kl), (expected, expected_kl))
    torch.testing.assert_close(ops.gaussian_kl(*args, **options), expected_kl)
    grads = [
        torch.autograd.grad(a.square().sum() + b.sum(), (mu, raw))
        for a, b in ((z, kl), (expected, expected_kl))
    ]
    torch.testing.assert_close(*grads)


PRIORS = {
    "full": ((B, D), (B, D)),
    "one for all": ((D,), (D,)),
    "one number": ((), ()),
    "mean of each": ((B, 1), (1, D)),
}


@pytest.mark.parametrize(("mean", "spread"), PRIORS.values(), ids=PRIORS)
def test_the_kl_to_a_learned_prior_is_torchs(backend, mean, spread):
    mu, log_var = leaf(B, D, device=backend), leaf(B, D, seed=1, device=backend)
    prior = leaf(*mean, seed=2, device=backend), leaf(*spread, seed=3, device=backend)
    expected = kl_divergence(Normal(mu, torch.exp(log_var / 2)), Normal(prior[0], torch.exp(prior[1] / 2)))
    z, kl, per_dim = ops.reparam_kl(mu, log_var, seed=1, prior=prior, per_dim=True)
    torch.testing.assert_close((kl, per_dim), (expected.sum(1), expected.mean(0)))
    torch.testing.assert_close(z, ops.reparam_kl(mu, log_var, seed=1)[0])
    each = ops.gaussian_kl(mu, log_var, prior=prior, reduction="none")
    torch.testing.assert_close(each, expected)
    grads = [torch.autograd.grad(k.sum(), (mu, log_var, *prior)) for k in (kl, expected)]
    torch.testing.assert_close(*grads)
    as_normal = Normal(prior[0], torch.exp(prior[1] / 2)) if mean == spread else None
    if as_normal is not None:
        torch.testing.assert_close(ops.gaussian_kl(mu, log_var, prior=as_normal), kl)


def test_the_kl_per_element_adds_up(backend):
    mu, log_var = leaf(B, D, 2, 2, device=backend), leaf(B, D, 2, 2, seed=1, device=backend)
    each = ops.reparam_kl(mu, log_var, reduction="none")[1]
    assert each.shape == mu.shape
    torch.testing.assert_close(each.flatten(1).sum(1), ops.gaussian_kl(mu, log_var))


def test_free_bits_are_the_papers_sum_of_maxima(backend):
    mu, log_var = leaf(B, D, device=backend), leaf(B, D, seed=1, device=backend)
    each = ops.gaussian_kl(mu, log_var, reduction="none")
    bits = float(each.mean(0).sort().values[:2].mean())  # one dimension is below
    expected = each.mean(0).clamp(min=bits).sum()
    kl = ops.gaussian_kl(mu, log_var, free_bits=bits)
    torch.testing.assert_close(kl.mean(), expected)
    grads = [torch.autograd.grad(k, (mu, log_var)) for k in (kl.mean(), expected)]
    torch.testing.assert_close(*grads)
    assert ((grads[0][0] == 0).all(0)).sum() == 1
    _, same, per_dim = ops.reparam_kl(mu, log_var, free_bits=bits, per_dim=True)
    torch.testing.assert_close((same, per_dim), (kl, each.mean(0)))


def test_a_generator_draws_the_noise(backend):
    mu, log_var = leaf(B, D, device=backend), leaf(B, D, seed=1, device=backend)

    def draw() -> Tensor:
        return ops.reparam_kl(mu, log_var, generator=torch.Generator(backend).manual_seed(5))[0]

    before = torch.get_rng_state()
    assert torch.equal(draw(), draw())
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator(backend).manual_seed(5)
    first, second = (ops.reparam_kl(mu, log_var, generator=generator)[0] for _ in range(2))
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


def test_without_a_seed_the_reference_draws_torchs_noise():
    mu, log_var = leaf(B, D), leaf(B, D, seed=1)
    torch.manual_seed(7)
    z = ops.reparam_kl(mu, log_var)[0]
    torch.manual_seed(7)
    torch.testing.assert_close(z, mu + torch.exp(log_var / 2) * torch.randn(B, D))


@pytest.mark.parametrize("seed", [None, 9], ids=["no seed", "seed"])
def test_several_draws_differ_and_share_the_kl(backend, seed):
    mu, log_var = leaf(B, D, 2, device=backend), leaf(B, D, 2, seed=1, device=backend)
    z, kl = ops.reparam_kl(mu, log_var, seed=seed, samples=5)
    assert z.shape == (5, B, D, 2)
    torch.testing.assert_close(kl, ops.gaussian_kl(mu, log_var))
    eps = (z - mu) * torch.exp(-log_var / 2)
    assert len(eps.flatten(1).unique(dim=0)) == 5
    (grad,) = torch.autograd.grad(z.sum(), log_var)
    torch.testing.assert_close(grad, (eps * torch.exp(log_var / 2) / 2).sum(0))
    if seed is not None:
        torch.testing.assert_close(z[0], ops.reparam_kl(mu, log_var, seed=seed)[0])
        part = ops.reparam_kl(mu[2:], log_var[2:], seed=seed, samples=5, first_sample=2)[0]
        torch.testing.assert_close(part, z[:, 2:])


def test_the_importance_weighted_bound_is_the_closed_form():
    """x = W z + noise with z ~ N(0, I): the marginal of x is Gaussian, and the ELBO has a formula."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(D, D, generator=generator, dtype=torch.float64)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64)
    variance, eye = torch.tensor(0.5, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    marginal = MultivariateNormal(torch.zeros(D, dtype=torch.float64), weights @ weights.T + variance * eye)
    exact = marginal.log_prob(x)

    def bound(mu: Tensor, std: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """The bound of Burda et al. (2016) and the negative ELBO of one-term-per-image losses."""
        posterior = Normal(mu, std)
        z, kl = ops.reparam_kl(posterior, samples=samples, generator=torch.Generator().manual_seed(1))
        recon, target = (z @ weights.T).flatten(0, 1), x.repeat(samples, 1)
        terms = ops.vae_loss(recon, target, kl.repeat(samples), reduction="none", decoder_variance=variance)
        constant = D * 0.5 * math.log(2 * math.pi)
        log_likelihood = -terms.recon.view(samples, B) - constant
        log_ratio = (Normal(0.0, 1.0).log_prob(z) - posterior.log_prob(z)).sum(2)
        importance = torch.logsumexp(log_likelihood + log_ratio, 0) - math.log(samples)
        return importance, terms.loss.view(samples, B).mean(0) + constant

    inverse = torch.linalg.inv(weights.T @ weights + variance * eye)
    mu, std = 0.5 * x @ inverse @ weights.T, torch.full((B, D), 0.4, dtype=torch.float64)
    importance, negative_elbo = bound(mu, std, 20_000)
    elbo = -negative_elbo
    assert (elbo < importance).all()
    assert (importance < exact + 0.1).all()
    expected = (
        -0.5 * ((x - mu @ weights.T).square().sum(1) + (0.16 * weights.square()).sum()) / variance
        - 0.5 * D * torch.log(2 * math.pi * variance)
        - ops.gaussian_kl(mu, std=std)
    )
    torch.testing.assert_close(elbo, expected, rtol=0.02, atol=0.02)


def test_one_dimension_has_the_exact_posterior_and_the_bound_is_tight():
    """With the true posterior each importance weight is p(x), so every K gives log p(x)."""
    x, w, variance = torch.linspace(-2, 2, B, dtype=torch.float64)[:, None], 1.5, 0.3
    spread = 1 / (1 + w * w / variance)
    posterior = Normal(spread * w * x / variance, torch.full_like(x, math.sqrt(spread)))
    exact = Normal(torch.zeros_like(x), math.sqrt(w * w + variance)).log_prob(x).sum(1)
    for samples in (1, 7):
        z, kl = ops.reparam_kl(posterior, samples=samples)
        recon, target = (w * z).flatten(0, 1), x.repeat(samples, 1)
        nll = ops.vae_loss(
            recon, target, kl.repeat(samples), reduction="none", decoder_variance=torch.tensor(variance)
        ).recon.view(samples, B)
        log_ratio = (Normal(0.0, 1.0).log_prob(z) - posterior.log_prob(z)).sum(2)
        weights = -nll - 0.5 * math.log(2 * math.pi) + log_ratio
        torch.testing.assert_close(
            torch.logsumexp(weights, 0) - math.log(samples), exact, rtol=1e-6, atol=1e-6
        )


ones = torch.ones
MISUSE = {
    "prior's shape": (
        {"prior": (ones(2), ones(2))},
        ValueError,
        r"prior's mu must broadcast to mu's shape.*\[2\]",
    ),
    "prior's log_var": (
        {"prior": (ones(3), ones(4, 2))},
        ValueError,
        r"prior's log_var must broadcast.*\[4, 2\]",
    ),
    "prior's device": (
        {"prior": (ones(3, device="meta"), ones(3))},
        ValueError,
        "prior's mu must be on.*meta",
    ),
    "prior": ({"prior": 1.0}, TypeError, r"prior must be \(mu, log_var\).*float"),
    "no samples": ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
    "half a sample": ({"samples": 1.5}, TypeError, "samples must be a Python int.*1.5"),
    "free bits": ({"free_bits": -1.0}, ValueError, "free_bits must be at least 0.*-1"),
    "learned free bits": ({"free_bits": ones(())}, TypeError, "free_bits must be a number, got Tensor"),
    "reduction": ({"reduction": "mean"}, ValueError, "reduction must be 'sum' or 'none', got 'mean'"),
    "generator": ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
    "two sources": ({"generator": torch.Generator(), "seed": 1}, ValueError, "a seed or a generator"),
    "two spreads": ({"std": ones(3)}, TypeError, "log_var or std, and not both"),
    "sample in a tensor": ({"first_sample": torch.tensor(1)}, TypeError, "first_sample must be a Python int"),
}


@pytest.mark.parametrize(("options", "error", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_says_what_was_expected(options, error, message):
    with pytest.raises(error, match=message):
        ops.reparam_kl(ones(B, D), ones(B, D), **options)


def test_a_wrong_posterior_is_named():
    mu = ones(B, D)
    with pytest.raises(TypeError, match="give log_var or std"):
        ops.reparam_kl(mu)
    with pytest.raises(ValueError, match="std must not be negative.*-1"):
        ops.gaussian_kl(mu, std=-mu)
    with pytest.raises(TypeError, match=r"mu must be a torch.distributions.Normal.*MultivariateNormal"):
        ops.gaussian_kl(MultivariateNormal(ones(D), torch.eye(D)))
    with pytest.raises(TypeError, match="a distribution has its own scale"):
        ops.gaussian_kl(Normal(mu, mu), mu)
