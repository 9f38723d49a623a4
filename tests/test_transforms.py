"""Derivatives beyond a plain backward pass: each transform gives on the kernels what the reference gives."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from bvae import ops
from bvae.kernels import launch
from bvae.losses import BetaLoss, CapacityLoss

B, D = 4, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def functions(device: torch.device) -> dict:
    """Scalar functions of x [B, D] that end in each operation."""
    log_var, target = 0.3 * normal(B, D, seed=1).to(device), normal(B, D, seed=2).to(device)
    kl = torch.arange(1.0, B + 1, device=device)

    def sample(x: Tensor) -> Tensor:
        z, kl = ops.reparam_kl(x, log_var, seed=7, step=2)
        return z.square().sum() + kl.sum()

    return {
        "sample": sample,
        "KL": lambda x: ops.gaussian_kl(log_var, x).sum(),
        "KL per dimension": lambda x: ops.reparam_kl(x, log_var, seed=1, per_dim=True)[2].square().sum(),
        "loss": lambda x: ops.vae_loss(x, target, kl, kl_weight=2.0, activation="tanh").loss,
        "loss by KL": lambda x: (
            ops.vae_loss(target, target, x.square().sum(1), step=3, capacity_iters=5).loss
        ),
        "Bernoulli": lambda x: ops.vae_loss(x, target.sigmoid(), kl, likelihood="bernoulli").loss,
        "loss per image": lambda x: ops.vae_loss(
            x, target, kl, reduction="none", weight=kl, likelihood="laplace"
        ).loss.sum(),
        "optimal variance": lambda x: ops.vae_loss(x, target, kl, decoder_variance="optimal").loss,
        "target": lambda x: ops.vae_loss(target, x.sigmoid(), kl, likelihood="bernoulli").loss,
        "KL to a prior": lambda x: ops.gaussian_kl(x, log_var, prior=(target, x), free_bits=0.1).sum(),
        "total correlation": lambda x: ops.total_correlation(x, target, log_var, 9),
        "total correlation by mu": lambda x: ops.total_correlation(target, x, x.cos(), 9),
        "module": lambda x: CapacityLoss(kl_weight=0.5).eval().to(device)(x, target, kl).loss,
    }


REFERENCE_ONLY = {"target", "KL to a prior"}
NAMES = list(functions(torch.device("cpu")))


def dual(function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def double_backward(function, x: Tensor) -> Tensor:
    """The gradient of the norm of a gradient, by a backward pass through a backward pass."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad(first.square().sum() + x.sum(), x)[0]


TRANSFORMS = {
    "grad": lambda f, x: grad(f)(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones((), device=x.device))[0],
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(f)(x),
    "grad of grad": lambda f, x: grad(lambda y: grad(f)(y).square().sum())(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, 2 * x])),
    "gradient per sample": lambda f, x: vmap(grad(f))(torch.stack([x, 2 * x])),
    "forward_ad": dual,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_kernels_are_the_reference(kernels, monkeypatch, transform, name):
    function, x = functions(kernels)[name], normal(B, D).to(kernels)
    result = TRANSFORMS[transform](function, x)
    monkeypatch.setattr(launch, "ENABLED", False)
    expected = TRANSFORMS[transform](function, x)
    assert expected.isfinite().all()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    if transform in ("grad", "vjp", "jacrev", "jacfwd"):  # and these are the plain gradient
        leaf = x.clone().requires_grad_()
        (plain,) = torch.autograd.grad(function(leaf), leaf)
        # torch gives the tangent of abs of a 0-d tensor as float64
        torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_right_or_refused(backend, name):
    function, x = functions(backend)[name], normal(B, D).to(backend)
    expected = grad(lambda y: grad(function)(y).square().sum() + y.sum())(x)
    if launch.runs_triton(x) and name not in REFERENCE_ONLY:
        with pytest.raises(RuntimeError, match=r"bvae::\w+ has no second derivative .*ENABLED = False"):
            double_backward(function, x)
    else:
        torch.testing.assert_close(double_backward(function, x), expected, rtol=1e-5, atol=1e-6)


def test_outside_a_transform_the_kernels_run_again(kernels):
    x = torch.ones(2, 2, device=kernels)
    seen = []
    grad(lambda y: seen.append(launch.runs_triton(y)) or y.sum())(x)
    with forward_ad.dual_level():
        seen.append(launch.runs_triton(x))
    assert seen == [False, False]
    assert launch.runs_triton(x)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_compiled(kernels, transform):
    function, x = functions(kernels)["sample"], normal(B, D).to(kernels)
    compiled = torch.compile(lambda y: TRANSFORMS[transform](function, y), backend="aot_eager")
    torch.testing.assert_close(compiled(x), TRANSFORMS[transform](function, x), rtol=1e-5, atol=1e-6)


def test_a_compiled_function_inside_forward_ad(kernels):
    """It was compiled with the kernels, and must not go on with them."""
    function, x = functions(kernels)["loss"], normal(B, D).to(kernels)
    compiled = torch.compile(function, backend="aot_eager")
    compiled(x)
    torch.testing.assert_close(jvp(compiled, (x,), (torch.ones_like(x),))[1], dual(function, x))


def test_gradients_per_sample_of_a_loss_module(kernels):
    """As differential privacy wants them: one gradient of the weights for each image."""
    model, loss = torch.nn.Linear(D, D).to(kernels), BetaLoss(kl_weight=0.1)
    images, kl = normal(B, D).to(kernels), torch.ones(1, device=kernels)

    def of_one(weights: dict, image: Tensor) -> Tensor:
        return loss(functional_call(model, weights, (image[None],)), image[None], kl).loss

    weights = {name: value.detach() for name, value in model.named_parameters()}
    found = vmap(grad(of_one), in_dims=(None, 0))(weights, images)
    for number, image in enumerate(images):
        expected = torch.autograd.grad(loss(model(image[None]), image[None], kl).loss, model.weight)[0]
        torch.testing.assert_close(found["weight"][number], expected, rtol=1e-5, atol=1e-6)
