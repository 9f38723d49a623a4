"""The gradients written by hand for a CPU: against float64, differentiated again, and where they run."""

import pytest
import torch
from numerics import assert_as_good_as_torch
from torch.autograd import grad

from bvae import ops, reference
from bvae.kernels import launch
from bvae.kernels.cpu import image_errors, reparam_kl
from bvae.objective import Objective

SHAPES = [(3, 5), (1, 1), (4, 3, 2, 5)]
OBJECTIVES = {
    "bernoulli": Objective(likelihood="bernoulli"),
    "gaussian": Objective(),
    "gaussian, tanh": Objective(activation="tanh"),
    "gaussian, sigmoid": Objective(activation="sigmoid"),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def latents(shape, dtype):
    both = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return both[0].requires_grad_(), both[1].requires_grad_()


def pixels(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(shape, generator=generator)).to(dtype)
    if len(shape) == 4:
        logits = logits.contiguous(memory_format=torch.channels_last)
    return logits.requires_grad_(), torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def sample(run, mu, log_var, eps, by):
    z, kl = run(mu, log_var, eps)[:2]
    return z, kl, *grad([z, kl], (mu, log_var), [by.to(z.dtype), torch.arange(1.0, len(kl) + 1).to(kl)])


def errors(run, recon, target, objective):
    each = run(recon, target, objective)
    return each, *grad(each, recon, torch.arange(1.0, len(each) + 1).to(each))


def our_errors(recon, target, objective):
    low = objective.pixel_range[0]
    return image_errors.image_errors(recon, target, objective.likelihood, objective.activation, low)


def reference_errors(recon, target, objective):
    dtype = reference.compute_dtype(recon)
    y = target.to(dtype)
    if target.dtype == torch.uint8:
        y = reference.scale_pixels(target, objective.pixel_range[0]).to(dtype)
    each = reference.pixel_errors(recon.to(dtype), y, objective)
    return each.sum(tuple(range(1, each.dim())))


def in_float64(tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sample_and_kl(shape, dtype):
    mu, log_var = latents(shape, dtype)
    eps, by = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    exact = sample(reference.reparam_kl, *in_float64((mu, log_var)), eps.double(), by.double())
    torchs = sample(reference.reparam_kl, mu, log_var, eps, by)
    for name, *each in zip(
        ("z", "KL", "by mu", "by log_var"),
        sample(reparam_kl.reparam_kl, mu, log_var, eps, by),
        torchs,
        exact,
        strict=True,
    ):
        assert_as_good_as_torch(*each, torch.device("cpu"), name)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors(shape, dtype, objective, kind):
    recon, target = pixels(shape, dtype)
    if kind != torch.uint8:
        target = reference.scale_pixels(target, objective.pixel_range[0]).to(kind)
    exact = errors(reference_errors, *in_float64((recon,)), target, objective)
    torchs = errors(reference_errors, recon, target, objective)
    ours = errors(our_errors, recon, target, objective)
    for name, *each in zip(("errors", "gradient"), ours, torchs, exact, strict=True):
        assert_as_good_as_torch(*each, torch.device("cpu"), name)


def test_extreme_logits_are_torchs():
    logits = torch.tensor([[0.0, -0.0, 1e-30, 90.0, -90.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]]).T
    logits.requires_grad_()
    for y in (0, 255, 100):
        target = torch.full_like(logits, y, dtype=torch.uint8)
        for objective in OBJECTIVES.values():
            found = [errors(run, logits, target, objective) for run in (our_errors, reference_errors)]
            for ours, torchs in zip(*found, strict=True):
                torch.testing.assert_close(ours, torchs, equal_nan=True)


def test_a_target_that_is_no_probability_shows():
    target = torch.tensor([[0.5], [2.0], [-1.0], [torch.nan]])
    each = our_errors(torch.zeros(4, 1), target, OBJECTIVES["bernoulli"])
    assert each.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_second_derivatives(objective):
    mu, log_var = latents((3, 5), torch.float32)
    logits, target = pixels((3, 5), torch.float32)
    eps = torch.randn(3, 5)

    def curvature(sampling, errors_of):
        z, kl = sampling(mu, log_var, eps)[:2]
        loss = (z.square().sum() + kl.sum()).square() + errors_of(logits, target, objective).sum().square()
        first = grad(loss, (mu, log_var, logits), create_graph=True)
        return grad(sum(f.square().sum() for f in first), (mu, log_var, logits))

    ours = curvature(reparam_kl.reparam_kl, our_errors)
    for a, e in zip(ours, curvature(reference.reparam_kl, reference_errors), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


def test_they_run_in_eager_mode_alone(monkeypatch):
    """A compiler, a transform, float64 and the switch for debugging get the reference."""
    called = []
    for module, name in ((reparam_kl, "reparam_kl"), (image_errors, "image_errors")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, run=run, name=name: called.append(name) or run(*a))
    mu, log_var = torch.zeros(2, 3), torch.zeros(2, 3)
    recon, target = torch.randn(2, 3), torch.full((2, 3), 100, dtype=torch.uint8)

    def both(mu, recon):
        z, kl = ops.reparam_kl(mu, log_var)
        return z.sum() + ops.vae_loss(recon, target, kl, likelihood="bernoulli").loss

    both(mu, recon)
    assert called == ["reparam_kl", "image_errors"]
    both(mu.double(), recon.double())
    torch.func.grad(both)(mu, recon)
    torch.compile(both, backend="eager")(mu, recon)
    monkeypatch.setattr(launch, "ENABLED", False)
    both(mu, recon)
    assert called == ["reparam_kl", "image_errors"]
