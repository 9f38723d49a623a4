"""batch_norm_leaky_relu: kernels and reference against float64; statistics, extremes, autograd, misuse."""

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_as_good_as_torch, same_places
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.library import opcheck

from bvae import ops, reference
from bvae.kernels import batch_norm, launch

SHAPES = {
    "1x1x1x2": (1, 1, 1, 2),
    "3x5x1x1": (3, 5, 1, 1),
    "1x127x1x9": (1, 127, 1, 9),
    "2x129x2x2": (2, 129, 2, 2),
    "2x41x11x13": (2, 41, 11, 13),
    "3x3x31x9": (3, 3, 31, 9),
}
CPU = torch.device("cpu")


@pytest.fixture(params=["few rows", "many rows"])
def size(request, monkeypatch):
    """Run small images as a layer of few rows, and as one of many: its rows are divided among programs."""
    if request.param == "many rows":
        monkeypatch.setattr(batch_norm, "_FEW_ROWS", 0)
        monkeypatch.setattr(batch_norm, "_PROGRAMS", 4)


def images(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1
    return x.to(device, dtype).to(memory_format=torch.channels_last)


def affine(channels: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, generator=generator).to(device).unbind()


def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(F.batch_norm(x, None, None, weight.to(x), bias.to(x), True, 0.1, 1e-5), 0.2)


def ours(x: Tensor, weight: Tensor, bias: Tensor, *running: Tensor) -> Tensor:
    return ops.batch_norm_leaky_relu(x, weight, bias, *running, negative_slope=0.2)


def output_and_gradients(function, x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    y.backward(grad_y.to(y))
    return [t.detach().cpu() for t in (y, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures("size")
def test_outputs_and_gradients_are_as_good_as_torchs(kernels, shape, dtype):
    _compare(kernels, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_reference_is_as_good_as_torch(shape, dtype):
    _compare(CPU, shape, dtype)


def _compare(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, (weight, bias) = images(shape, dtype), affine(shape[1])
    grad_y = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = output_and_gradients(ours, *(t.to(device) for t in (x, weight, bias, grad_y)))
    plain = output_and_gradients(torchs, x, weight, bias, grad_y)
    exact = output_and_gradients(torchs, *(t.double() for t in (x, weight, bias, grad_y)))
    xhat = F.batch_norm(x.double(), None, None, training=True)
    terms = {"weight": (grad_y * xhat).abs().sum((0, 2, 3)), "bias": grad_y.double().abs().sum((0, 2, 3))}
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for name, *triple in zip(("y", "x", "weight", "bias"), found, plain, exact, strict=True):
        if shape == SHAPES["1x1x1x2"] and name == "x":
            assert triple[0].abs().max() < 1e-3  # two numbers: the exact gradient is the last bits of a zero
            continue
        if name in terms:  # the roundings of a sum grow with its terms
            triple = [torch.cat([part, terms[name].to(part)]) for part in triple]
        assert_as_good_as_torch(*triple, device, what=name)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (2, 3, 17, 16)], ids=str)
def test_the_running_statistics_are_torchs(backend, shape):
    x, (weight, bias) = images(shape, device=backend), affine(shape[1], backend)
    running, expected = ([torch.ones(shape[1], device=backend) for _ in range(2)] for _ in range(2))
    ops.batch_norm_leaky_relu(x, weight, bias, *running, momentum=0.3)
    F.batch_norm(x, *expected, training=True, momentum=0.3)
    for a, b in zip(running, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("rows", [20, 2001])
def test_a_large_mean_does_not_cancel(backend, rows):
    generator = torch.Generator().manual_seed(3)
    x = (1000 + torch.randn(1, 2, rows, 1, generator=generator)).to(memory_format=torch.channels_last)
    running = [torch.zeros(2, device=backend) for _ in range(2)]
    one, zero = torch.ones(2, device=backend), torch.zeros(2, device=backend)
    ops.batch_norm_leaky_relu(x.to(backend), one, zero, *running, momentum=1.0)
    exact_mean, exact_var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
    assert ((running[0].cpu() - exact_mean) / exact_mean).abs().max() < 2**-22
    assert ((running[1].cpu() - exact_var) / exact_var).abs().max() < 2e-5


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("rows", [9, 1300])
@pytest.mark.parametrize("value", [0.0, -3.0, 1234.5678])
def test_equal_numbers_give_the_bias(kernels, value, rows):
    x = torch.full((1, 3, rows, 1), value, device=kernels).to(memory_format=torch.channels_last)
    weight, bias = affine(3, kernels)
    running = [torch.zeros(3, device=kernels) for _ in range(2)]
    y = ops.batch_norm_leaky_relu(x, weight, bias, *running, momentum=1.0, negative_slope=1.0)
    assert torch.equal(y, bias[:, None, None].expand_as(y))
    assert torch.equal(running[0], x[0, :, 0, 0])
    assert torch.equal(running[1], torch.zeros(3, device=kernels))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("rows", [9, 1300])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, -1])
def test_nan_is_where_torch_has_it(backend, rows, value, at):
    x, (weight, bias) = images((1, 3, rows, 1)), affine(3)
    x[0, 1, at, 0] = value
    grad_y = torch.ones_like(x)
    found = output_and_gradients(ours, *(t.to(backend) for t in (x, weight, bias, grad_y)))
    expected = output_and_gradients(torchs, x, weight, bias, grad_y)
    for a, b in zip(found, expected, strict=True):
        assert same_places(a, b)
    assert found[0][0, 0].isfinite().all()


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (2, 40, 21, 13)], ids=str)
def test_equal_inputs_give_equal_bits(kernels, shape):
    tensors = images(shape, device=kernels), *affine(shape[1], kernels), torch.ones(shape, device=kernels)
    for a, b in zip(*(output_and_gradients(ours, *tensors) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_launches_by_rows():
    for height, launches in ((48, 1), (49, 2)):  # 2304 rows, and more
        x, vector = images((1, 33, height, 48)).to("meta"), torch.empty(33, device="meta")
        forward, _ = batch_norm.plan_forward(x, vector, vector, 1e-5, 0.01)
        backward, _ = batch_norm.plan_backward(x, x, *[vector] * 4, 0.01)
        assert (len(forward), len(backward)) == (launches, launches)


@pytest.mark.usefixtures("size")
def test_the_counters_are_left_at_zero(kernels, monkeypatch):
    lent = []

    def lend(count: int, device: torch.device) -> Tensor:
        lent.append(torch.zeros(count, dtype=torch.int32, device=device))
        return lent[-1]

    monkeypatch.setattr(batch_norm, "completion_counters", lend)
    x, (weight, bias) = images((1, 33, 31, 9), device=kernels), affine(33, kernels)
    output_and_gradients(ours, x, weight, bias, x)
    assert [len(counters) for counters in lent] == ([2, 2] if batch_norm._FEW_ROWS == 0 else [])
    assert all((counters == 0).all() for counters in lent)


LAYOUTS = {
    "expanded": lambda g: g[:1, :1, :1, :1].expand_as(g),
    "contiguous": lambda g: g.contiguous(),
    "sliced": lambda g: g.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_incoming_gradient_may_have_any_strides(kernels, layout):
    x, (weight, bias) = images((3, 4, 6, 5), device=kernels), affine(4, kernels)
    grad_y = layout(images((3, 4, 6, 5), device=kernels))
    strided = output_and_gradients(ours, x, weight, bias, grad_y)
    dense = output_and_gradients(ours, x, weight, bias, grad_y.contiguous(memory_format=torch.channels_last))
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_other_layouts_run_the_reference(kernels):
    x, (weight, bias) = images((3, 4, 6, 5), device=kernels), affine(4, kernels)
    expected = ours(x, weight, bias)
    strided = x.repeat_interleave(2, 3)[..., ::2]
    assert not batch_norm.takes(strided)
    for other in (x.contiguous(), strided, x.double()):
        torch.testing.assert_close(ours(other, weight, bias).float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("size")
def test_opcheck(kernels):
    x, (weight, bias) = images((3, 5, 2, 2), device=kernels).requires_grad_(), affine(5, kernels)
    leaves = x, weight.requires_grad_(), bias.requires_grad_()
    opcheck(batch_norm.batch_norm_leaky_relu, (*leaves, 1e-5, 0.01))
    y, mean, rstd, _ = batch_norm.batch_norm_leaky_relu(*leaves, 1e-5, 0.01)
    given = [t.detach() for t in (y, *leaves, mean, rstd)]
    opcheck(batch_norm.batch_norm_leaky_relu_backward, (*given, 0.01))


def test_compiled(kernels):
    x, (weight, bias) = images((3, 5, 2, 2), device=kernels), affine(5, kernels)

    def results(function) -> list[Tensor]:
        running = [torch.zeros(5, device=kernels) for _ in range(2)]
        return output_and_gradients(lambda *t: function(*t, *running), x, weight, bias, x.flip(0)) + running

    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for a, b in zip(results(compiled), results(ours), strict=True):
        torch.testing.assert_close(a, b)


def test_the_reference_is_differentiated_exactly():
    x, (weight, bias) = images((2, 3, 2, 2)).double().requires_grad_(), affine(3)
    leaves = x, weight.double().requires_grad_(), bias.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: reference.batch_norm_leaky_relu(*t)[0], leaves)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_are_the_references(kernels, monkeypatch, transform):
    x, (weight, bias) = images((2, 3, 2, 2), device=kernels), affine(3, kernels)

    def function(x: Tensor) -> Tensor:
        return ours(x, weight, bias).square().sum()

    def result() -> Tensor:
        if transform == "vmap":
            return vmap(function)(torch.stack([x, 2 * x]))
        return grad(function)(x) if transform == "grad" else jvp(function, (x,), (x.square(),))[1]

    found = result()
    monkeypatch.setattr(launch, "ENABLED", False)
    torch.testing.assert_close(found, result())


def test_a_second_derivative_is_refused(kernels):
    x, (weight, bias) = images((2, 3, 2, 2), device=kernels).requires_grad_(), affine(3, kernels)
    (first,) = torch.autograd.grad(ours(x, weight, bias).square().sum(), x, retain_graph=True)
    assert first.isfinite().all()
    with pytest.raises(RuntimeError, match="bvae::batch_norm_leaky_relu has no second derivative"):
        torch.autograd.grad(ours(x, weight, bias).square().sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("shape", "channels", "text"),
    [
        ((1, 3, 1, 1), 3, r"more than one number per channel, got x float32 \[1, 3, 1, 1\]"),
        ((4, 3), 3, r"x must be \[N, C, H, W\], got"),
        ((4, 3, 2, 2), 4, r"weight must be \[3\], one per channel of x"),
    ],
)
def test_misuse(shape, channels, text):
    with pytest.raises(ValueError, match=text):
        ops.batch_norm_leaky_relu(torch.ones(shape), *affine(channels))
    with pytest.raises(TypeError, match="x must be float32"):
        ops.batch_norm_leaky_relu(torch.ones(shape, dtype=torch.uint8), *affine(channels))
