"""vae_loss: likelihoods, variances, weights, masks, one term per image, learned options."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from loss_inputs import SHAPE, decoder_output, divergence, pixels
from numerics import DTYPES, assert_as_good_as_torch, same_places
from torch import Tensor, nn
from torch.distributions import Laplace, Normal
from torch.library import opcheck

from bvae import ops, reference
from bvae.kernels import image_errors, launch
from bvae.losses import AnnealedBeta, BetaLoss, CapacityLoss
from bvae.objective import Objective

CPU = torch.device("cpu")
SIZE = math.prod(SHAPE[1:])
ONE = torch.tensor(0.7)


def activated(recon: Tensor, options: dict) -> Tensor:
    return {"tanh": torch.tanh, "sigmoid": torch.sigmoid, None: lambda x: x}[options.get("activation")](recon)


def elements(recon: Tensor, target: Tensor, options: dict) -> Tensor:
    """The negative log-likelihood of each element by torch's losses, in the dtype of recon."""
    unit = options.get("likelihood") == "bernoulli" or options.get("activation") == "sigmoid"
    y = target.to(recon.dtype) / 255 if unit else target.to(recon.dtype) / 127.5 - 1
    x, kind = activated(recon, options), options.get("likelihood", "gaussian")
    scale, variance = options.get("decoder_scale", 1.0), options.get("decoder_variance", 0.5)
    if kind == "bernoulli":
        return (
            F.binary_cross_entropy_with_logits(x, y, reduction="none")
            if options.get("from_logits", True)
            else F.binary_cross_entropy(x, y, reduction="none")
        )
    if kind == "laplace":
        error = F.l1_loss(x, y, reduction="none") / scale
        return error + torch.log(scale) if isinstance(scale, Tensor) else error
    if kind == "logistic":
        half = 1 / 510 if unit else 1 / 255
        above, below = F.softplus((x - y - half) / scale), F.softplus((y - half - x) / scale)
        width = -torch.log(-torch.expm1(torch.as_tensor(-2 * half / scale, dtype=recon.dtype)))
        low = target == 0
        return torch.where(low, above, torch.where(target == 255, below, above + below + width))
    error = F.mse_loss(x, y, reduction="none")
    if isinstance(variance, Tensor):
        return 0.5 * (torch.log(variance) + error / variance)
    if variance == "optimal":
        return 0.5 * (torch.log(error.mean()) + error / error.mean())
    return error / (2 * variance)


LIKELIHOODS = {
    "laplace": {"likelihood": "laplace", "decoder_scale": 0.3, "activation": "tanh"},
    "laplace, sum": {"likelihood": "laplace", "reduction": "sum"},
    "logistic": {"likelihood": "logistic", "decoder_scale": 0.05, "activation": "tanh", "reduction": "sum"},
    "logistic of a sigmoid": {"likelihood": "logistic", "decoder_scale": 0.1, "activation": "sigmoid"},
    "optimal": {"decoder_variance": "optimal", "activation": "tanh", "reduction": "sum"},
    "optimal, mean": {"decoder_variance": "optimal"},
    "a variance": {"decoder_variance": ONE, "activation": "tanh", "reduction": "sum"},
    "a scale": {"likelihood": "laplace", "decoder_scale": ONE, "activation": "sigmoid"},
    "a scale of logistic": {"likelihood": "logistic", "decoder_scale": 0.1 * ONE},
    "variances": {"decoder_variance": torch.linspace(0.1, 2.0, 20), "reduction": "sum"},
    "scales": {"likelihood": "laplace", "decoder_scale": torch.linspace(0.1, 2.0, 12)[:, None]},
    "gaussian, none": {"reduction": "none", "activation": "tanh", "decoder_variance": 0.1},
    "bernoulli, none": {"reduction": "none", "likelihood": "bernoulli"},
    "logistic, none": {"reduction": "none", "likelihood": "logistic", "decoder_scale": 0.2},
}


def reduced(per_element: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return per_element.mean()
    per_image = per_element.flatten(1).sum(1)
    return per_image if reduction == "none" else per_image.mean()


def placed(options: dict, device: torch.device, dtype: torch.dtype = torch.float32) -> dict:
    """The options with their tensors as leaves on a device."""
    return {
        k: v.detach().to(device, dtype).requires_grad_() if isinstance(v, Tensor) else v
        for k, v in options.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_likelihoods_are_as_good_as_torchs(backend, options, dtype):
    def run(function, recon: Tensor, target: Tensor, options: dict) -> list[Tensor]:
        term = function(recon, target, options)
        (2 * (term * torch.arange(1.0, 1 + term.numel()).to(term).view(term.shape)).sum() + 1).backward()
        learned = [v.grad.detach().cpu() for v in options.values() if isinstance(v, Tensor)]
        return [term.detach().cpu(), recon.grad.cpu(), *learned]

    def plain(recon: Tensor, target: Tensor, options: dict) -> Tensor:
        return reduced(elements(recon, target, options), options.get("reduction", "mean"))

    def fused(recon: Tensor, target: Tensor, options: dict) -> Tensor:
        return ops.vae_loss(recon, target, divergence(backend), **options).recon

    ours = run(fused, decoder_output(dtype, backend), pixels(backend), placed(options, backend))
    torchs = run(plain, decoder_output(dtype, CPU), pixels(CPU), placed(options, CPU))
    exact_recon = decoder_output(dtype, CPU).detach().double().requires_grad_()
    exact = run(plain, exact_recon, pixels(CPU), placed(options, CPU, torch.float64))
    if len(ours) == 3:  # a sum and a logarithm that cancel: torch cancels them element by element
        for a, b in zip((ours[0], ours[2]), (exact[0], exact[2]), strict=True):
            torch.testing.assert_close(
                a.double(), b, rtol=1e-3 if dtype == torch.float32 else 2e-2, atol=1e-3
            )
        ours, torchs, exact = ([each[1]] for each in (ours, torchs, exact))
    for what, *triple in zip(("recon", "d recon"), ours, torchs, exact, strict=False):
        assert_as_good_as_torch(*triple, backend, what=what)


def test_the_closed_forms_are_torchs_distributions(backend):
    x, y = torch.randn(3, 7, device=backend), torch.rand(3, 7, device=backend) * 2 - 1
    scale = torch.tensor(0.6, device=backend)
    kl = torch.zeros(3, device=backend)
    gaussian = ops.vae_loss(x, y, kl, decoder_variance=scale**2, reduction="none").recon
    expected = -Normal(x, scale).log_prob(y).sum(1) - 7 * 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(gaussian, expected)
    laplace = ops.vae_loss(x, y, kl, likelihood="laplace", decoder_scale=scale, reduction="none").recon
    torch.testing.assert_close(laplace, -Laplace(x, scale).log_prob(y).sum(1) - 7 * math.log(2))


def test_the_logistics_256_bins_have_probability_one(backend):
    values = torch.arange(256, dtype=torch.uint8, device=backend)[:, None]
    for mean, scale in ((0.3, 0.05), (-1.2, 0.01), (0.999, 1.0)):
        recon = torch.full((256, 1), mean, device=backend)
        kl = torch.zeros(256, device=backend)
        nll = ops.vae_loss(
            recon, values, kl, likelihood="logistic", decoder_scale=scale, reduction="none"
        ).recon
        assert float(torch.exp(-nll.double()).sum()) == pytest.approx(1.0, abs=1e-4)


def test_the_optimal_variance_is_the_best_one(backend):
    arguments = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    best = ops.vae_loss(*arguments, decoder_variance="optimal", activation="tanh")
    mse = ops.vae_loss(*arguments, activation="tanh").recon.item()
    for factor in (0.5, 0.9, 1.0, 1.1, 2.0):
        other = ops.vae_loss(
            *arguments, decoder_variance=torch.tensor(factor * mse, device=backend), activation="tanh"
        )
        assert float(other.recon) >= float(best.recon) - 1e-5
    gradients = [torch.autograd.grad(t.recon, arguments[0])[0] for t in (best,)]
    torch.testing.assert_close(
        gradients[0],
        torch.autograd.grad(
            ops.vae_loss(*arguments, activation="tanh", decoder_variance=mse).recon, arguments[0]
        )[0],
    )


# probabilities


def test_probabilities_are_torchs_binary_cross_entropy(backend):
    logits = decoder_output(torch.float32, backend)
    target = pixels(backend)
    recon = torch.sigmoid(logits)
    ours = ops.vae_loss(recon, target, divergence(backend), likelihood="bernoulli", from_logits=False).recon
    expected = F.binary_cross_entropy(recon, target.float() / 255)
    torch.testing.assert_close(ours, expected)
    grads = [torch.autograd.grad(t, logits, retain_graph=True)[0] for t in (ours, expected)]
    torch.testing.assert_close(*grads)
    from_logits = ops.vae_loss(logits, target, divergence(backend), likelihood="bernoulli").recon
    torch.testing.assert_close(ours, from_logits)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-4, 0.5, 1.0])
def test_extreme_probabilities_are_clamped_as_torchs(backend, value, dtype):
    results = []
    target = torch.tensor([[0.0, 1.0, 0.25]], device=backend)
    for torchs in (False, True):
        recon = torch.full((1, 3), value, device=backend, dtype=dtype, requires_grad=True)
        if torchs:
            term = F.binary_cross_entropy(recon.float(), target)
        else:
            kl = torch.zeros(1, device=backend)
            term = ops.vae_loss(recon, target, kl, likelihood="bernoulli", from_logits=False).recon
        term.backward()
        results.append((term.detach(), recon.grad))
    for a, b in zip(*results, strict=True):
        assert same_places(a, b)
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)


def test_probabilities_for_logits_give_one_warning(backend):
    target, kl = torch.rand(4, 5, device=backend), torch.zeros(4, device=backend)
    with pytest.warns(UserWarning, match="from_logits=False") as caught:
        ops.vae_loss(torch.rand(4, 5, device=backend) / 2 + 0.4, target, kl, likelihood="bernoulli")
    ours = [warning for warning in caught if warning.category is UserWarning]
    assert len(ours) == (1 if backend.type == "cpu" else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for logits in (torch.randn(4, 5, device=backend), torch.rand(4, 5, device=backend) / 5):
            ops.vae_loss(logits, target, kl, likelihood="bernoulli")
        ops.vae_loss(torch.rand(4, 5, device=backend), target, kl, likelihood="bernoulli", from_logits=False)


# weights, masks, one term per image


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_the_mean_over_the_images_is_the_sum(backend, likelihood):
    recon, target, kl = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    options = {"kl_weight": 0.3, "likelihood": likelihood}
    each = ops.vae_loss(recon, target, kl, reduction="none", **options)
    whole = ops.vae_loss(recon, target, kl, reduction="sum", **options)
    assert each.loss.shape == each.recon.shape == each.kld.shape == (5,)
    assert each.capacity.shape == ()
    torch.testing.assert_close(each.loss, each.recon + 0.3 * kl)
    for ours, expected in zip(each, whole, strict=True):
        torch.testing.assert_close(ours.mean(), expected)
    grads = [torch.autograd.grad(t.mean(), (recon, kl)) for t in (each.loss, whole.loss)]
    torch.testing.assert_close(*grads)


def test_a_capacity_per_image_is_the_distance_of_each(backend):
    recon, target, kl = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    each = ops.vae_loss(recon, target, kl, reduction="none", kl_weight=2.0, step=5000)
    torch.testing.assert_close(each.loss, each.recon + 2 * (kl - 12.5).abs())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("step", [None, 5000], ids=["beta", "capacity"])
def test_weights_average_and_zero_leaves_an_image_out(backend, reduction, step):
    recon, target, kl = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    options = {"reduction": reduction, "activation": "tanh", "step": step, "kl_weight": 0.3}
    weight = torch.tensor([3.0, 0.0, 3.0, 3.0, 0.0], device=backend)
    kept = [0, 2, 3]
    terms = ops.vae_loss(recon, target, kl, weight=weight, **options)
    expected = ops.vae_loss(recon[kept], target[kept], kl[kept], **options)
    torch.testing.assert_close(terms, expected)
    grads = [torch.autograd.grad(t.loss, (recon, kl)) for t in (terms, expected)]
    torch.testing.assert_close(*grads)


def test_a_weight_gets_a_gradient(backend):
    recon, target, kl = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    weight = torch.rand(5, device=backend, requires_grad=True)
    each = ops.vae_loss(recon, target, kl, reduction="none", weight=weight).loss
    plain = ops.vae_loss(recon, target, kl, reduction="none").loss
    torch.testing.assert_close(each, weight * plain)
    (grad,) = torch.autograd.grad(each.sum(), weight)
    torch.testing.assert_close(grad, plain)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_mask_leaves_out_whatever_is_there(backend, reduction):
    recon, kl = decoder_output(torch.float32, backend), divergence(backend)
    target = reference.scale_pixels(pixels(backend))
    mask = torch.rand(5, 1, 12, 20, device=backend) > 0.4
    broken = torch.where(mask, target, torch.nan)
    ours = ops.vae_loss(recon, broken, kl, mask=mask, reduction=reduction, activation="tanh")
    error = torch.where(mask, (torch.tanh(recon) - target).square(), 0.0)
    count = mask.expand(SHAPE).sum()
    per_image = error.flatten(1).sum(1)
    expected = {"mean": error.sum() / count, "sum": per_image.mean(), "none": per_image}[reduction]
    torch.testing.assert_close(ours.recon, expected)
    grads = [torch.autograd.grad(t.sum(), recon)[0] for t in (ours.recon, expected)]
    torch.testing.assert_close(*grads)


def test_a_target_that_wants_a_gradient_gets_it(backend):
    recon = decoder_output(torch.float32, backend)
    target = torch.rand(SHAPE, device=backend, requires_grad=True)
    ours = ops.vae_loss(recon, target, divergence(backend)).recon
    grads = [torch.autograd.grad(t, (recon, target)) for t in (ours, F.mse_loss(recon, target))]
    torch.testing.assert_close(*grads)


# numbers that are tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_weight_and_capacity_may_be_learned_in_any_dtype(backend, shape, dtype):
    recon, target, kl = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    gamma = torch.full(shape, 0.5, dtype=dtype, device=backend, requires_grad=True)
    capacity = torch.full(shape, 8.0, dtype=dtype, device=backend, requires_grad=True)
    terms = ops.vae_loss(recon, target, kl, kl_weight=gamma, max_capacity=capacity, step=2, capacity_iters=4)
    by_number = ops.vae_loss(recon, target, kl, kl_weight=0.5, max_capacity=8.0, step=2, capacity_iters=4)
    torch.testing.assert_close(terms, by_number)
    d_gamma, d_capacity = torch.autograd.grad(terms.loss, (gamma, capacity))
    excess = float(kl.mean()) - 4.0
    assert float(d_gamma) == pytest.approx(abs(excess), rel=1e-2)
    assert float(d_capacity) == pytest.approx(-0.5 * 0.5, rel=1e-2)  # half of C is reached
    assert (d_gamma.shape, d_gamma.dtype) == (shape, dtype)


@pytest.mark.parametrize("make", [BetaLoss, AnnealedBeta, CapacityLoss])
def test_modules_learn_their_numbers(backend, make):
    first = {CapacityLoss: "gamma"}.get(make, "beta")
    parameters = {first: nn.Parameter(torch.tensor(2.0)), "decoder_variance": nn.Parameter(torch.tensor(0.5))}
    if make is CapacityLoss:
        parameters["max_capacity"] = nn.Parameter(torch.tensor([25.0]))
    loss = make(kl_weight=0.5, **parameters).to(backend)
    assert {name for name, _ in loss.named_parameters()} == set(parameters)
    arguments = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    terms = loss(*arguments)
    terms.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    ramp = {AnnealedBeta: 1 / 10_000}.get(make, 1.0)
    excess = (terms.kld - terms.capacity).abs()
    torch.testing.assert_close(terms.loss, terms.recon + 2 * 0.5 * ramp * excess)
    assert float(getattr(loss, first).grad) == pytest.approx(0.5 * ramp * float(excess))


def test_a_beta_in_a_tensor_moves_with_the_module_and_may_be_written(backend):
    beta = torch.tensor([4.0], dtype=torch.float64)
    loss = BetaLoss(beta=beta, kl_weight=1.0).to(backend)
    recon, target, kl = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    for value in (4.0, 0.5):
        loss.beta.fill_(value)
        terms = loss(recon, target, kl)
        torch.testing.assert_close(terms.loss, terms.recon + value * terms.kld)
    assert not loss.state_dict()


def test_beta_warms_up_and_the_counter_is_saved(backend):
    loss = AnnealedBeta(beta=4.0, warmup_steps=4, kl_weight=1.0).to(backend)
    arguments = decoder_output(torch.float32, backend), pixels(backend), divergence(backend)
    factors = []
    for _ in range(6):
        terms = loss(*arguments)
        factors.append(float((terms.loss - terms.recon) / terms.kld))
    assert factors == pytest.approx([1.0, 2.0, 3.0, 4.0, 4.0, 4.0], rel=1e-5)
    again = AnnealedBeta(beta=4.0, warmup_steps=4, kl_weight=1.0).to(backend)
    again.load_state_dict(loss.state_dict())
    assert int(again.step) == 6
    again.eval()(*arguments)
    assert int(again.step) == 6
    again.load_state_dict({})  # of a model whose loss had no counter
    assert int(again.step) == 6


# registration, gradients, misuse


@pytest.mark.parametrize("layout", ["channels last", "contiguous", "cropped"])
def test_layouts_change_nothing(kernels, layout):
    recon = decoder_output(torch.float32, kernels).detach()
    target = pixels(kernels)
    if layout == "contiguous":
        recon = recon.contiguous()
    if layout == "cropped":
        recon, target = recon[..., 1:-1, 2:-2], target[..., 1:-1, 2:-2]
    recon.requires_grad_()
    kl, weight = divergence(kernels), torch.rand(5, device=kernels)
    loss = ops.vae_loss(recon, target, kl, weight=weight, activation="tanh").loss
    (gradient,) = torch.autograd.grad(loss, recon)
    same = recon.detach().requires_grad_()
    expected = reference.vae_loss(same, target, kl, Objective(activation="tanh"), weight=weight).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, same)[0])


@pytest.mark.parametrize("shape", [(1, 1), (2, 41), (3, 2049), (300, 1)], ids=str)
def test_odd_sizes(kernels, shape):
    recon, target = torch.randn(shape, device=kernels, requires_grad=True), torch.randn(shape, device=kernels)
    each = ops.vae_loss(recon, target, torch.ones(shape[0], device=kernels), reduction="none")
    each.recon.sum().backward()
    torch.testing.assert_close(each.recon, (recon - target).square().sum(1))
    torch.testing.assert_close(recon.grad, 2 * (recon - target).detach())


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace", "logistic", "bernoulli", "probabilities"])
def test_opcheck(kernels, likelihood):
    recon = torch.rand(2, 3, 5, 7, device=kernels, requires_grad=True)
    opcheck(
        image_errors.image_errors, (recon, pixels(kernels, (2, 3, 5, 7)), True, likelihood, None, 0.5, 0.0)
    )
    opcheck(image_errors.image_errors_backward, (recon.detach(), torch.ones(2, device=kernels), 2.0))


def test_compiled_equals_eager(backend):
    weight, variance = torch.rand(5, device=backend), torch.tensor(0.4, device=backend)

    def function(recon: Tensor) -> Tensor:
        terms = ops.vae_loss(recon, target, kl, weight=weight, decoder_variance=variance, activation="tanh")
        return terms.loss

    target, kl = pixels(backend), divergence(backend).detach()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled):
        recon = decoder_output(torch.float32, backend)
        results.append((loss := f(recon), torch.autograd.grad(loss, recon)[0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_gradcheck_of_the_reference_path(options):
    recon = torch.randn(2, 1, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    target = pixels(CPU, (2, 1, 12, 20))
    kl, options = torch.ones(2, dtype=torch.float64), placed(options, CPU, torch.float64)

    def function(recon: Tensor) -> Tensor:
        return ops.vae_loss(recon, target, kl, **options).recon

    assert torch.autograd.gradcheck(function, recon.requires_grad_(), fast_mode=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("options", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_extremes_stand_where_the_reference_has_them(kernels, monkeypatch, options):
    if any(isinstance(v, Tensor) and v.numel() > 1 for v in options.values()):
        pytest.skip("the reference runs")
    values = [0.0, 1e-30, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan]
    for value in values:
        results = []
        for enabled in (True, False):
            monkeypatch.setattr(launch, "ENABLED", enabled)
            recon = torch.full((1, 3), value, device=kernels, requires_grad=True)
            target = torch.tensor([[0.0, 1.0, 0.5]], device=kernels)
            term = ops.vae_loss(
                recon, target, torch.zeros(1, device=kernels), **placed(options, kernels)
            ).recon
            term.sum().backward()
            results.append((term.detach(), recon.grad))
        for a, b in zip(*results, strict=True):
            assert same_places(a, b), value
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-6)


ARGUMENTS = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(2)
MISUSE = {
    "weight's shape": ({"weight": torch.ones(3)}, ValueError, r"weight must be \[2\].*\[3\]"),
    "weight negative": ({"weight": torch.tensor([1.0, -1.0])}, ValueError, "weight must be at least 0.*-1"),
    "weight NaN": ({"weight": torch.tensor([1.0, torch.nan])}, ValueError, "weight must be at least 0.*nan"),
    "weight's device": ({"weight": torch.ones(2, device="meta")}, ValueError, "weight must be on.*cpu.*meta"),
    "mask's shape": (
        {"mask": torch.ones(2, 3, 4, 5, dtype=torch.bool)},
        ValueError,
        r"mask must have recon's shape \[2, 3, 4, 4\].*\[2, 3, 4, 5\]",
    ),
    "mask's dtype": ({"mask": torch.ones(2, 3, 4, 4)}, TypeError, "mask must be bool.*float32"),
    "variance's shape": (
        {"decoder_variance": torch.ones(5)},
        ValueError,
        r"decoder_variance must broadcast to recon's shape.*\[5\]",
    ),
    "variance negative": (
        {"decoder_variance": torch.tensor(-1.0)},
        ValueError,
        "decoder_variance must be positive.*-1",
    ),
    "variance's name": (
        {"decoder_variance": "best"},
        ValueError,
        "decoder_variance must be .*'optimal'.*best",
    ),
    "variance of laplace": (
        {"decoder_variance": "optimal", "likelihood": "laplace"},
        ValueError,
        "decoder_variance belongs to a gaussian",
    ),
    "scale of a gaussian": (
        {"decoder_scale": 0.5},
        ValueError,
        "decoder_scale belongs to a laplace",
    ),
    "scale": (
        {"decoder_scale": 0.0, "likelihood": "laplace"},
        ValueError,
        "decoder_scale must be positive, got 0",
    ),
    "logits of a gaussian": ({"from_logits": False}, ValueError, "from_logits=False needs .*'bernoulli'"),
    "no probability": (
        {"from_logits": False, "likelihood": "bernoulli", "recon": ARGUMENTS[0] - 0.5},
        ValueError,
        r"recon with from_logits=False must lie in \[0, 1\].*-0.5",
    ),
    "capacity's shape": (
        {"max_capacity": torch.ones(2)},
        ValueError,
        r"max_capacity must be a number or one in a tensor on cpu, got float32 \[2\]",
    ),
    "iterations in a tensor": (
        {"capacity_iters": torch.tensor(5.0)},
        TypeError,
        "capacity_iters must be a number, got a tensor",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_says_what_was_expected(options, error, message):
    recon, target, kl = ARGUMENTS
    options = dict(options)
    with pytest.raises(error, match=message):
        ops.vae_loss(options.pop("recon", recon), target, kl, **options)


def test_where_nobody_can_look_a_wrong_number_makes_the_loss_nan():
    recon, target, kl = ARGUMENTS
    wrong = {
        "weight": reference.vae_loss(recon, target, kl, Objective(), weight=torch.tensor([1.0, -1.0])),
        "variance": reference.vae_loss(recon, target, kl, Objective(decoder_variance=torch.tensor(-1.0))),
    }
    assert all(terms.loss.isnan() for terms in wrong.values())
