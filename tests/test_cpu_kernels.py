"""The layers in C++ for CPUs, against float64 and the plain operations, eager and compiled."""

import ctypes
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_good_as_torch, same_places
from torch import nn

from bvae.kernels import launch
from bvae.kernels.cpu import batch_norm, convolution, library
from bvae.layers import BatchNormLeakyReLU, Downsample, ToImage, Upsample

CPU = torch.device("cpu")
WIDTHS = (1, 3, 5, 8, 12, 32)
LAYERS = {
    "down": lambda: Downsample(32, 40),
    "up": lambda: Upsample(40, 32, 3, 5),
    "image": lambda: ToImage(5, 3),
    "norm": lambda: BatchNormLeakyReLU(5),
}
SIDES = {"down": 7, "up": 3, "image": 7, "norm": 7}


@pytest.fixture(scope="session")
def built(user_cache):
    """The library, built once in the tests' cache folder."""
    try:
        return library.load()
    except library.NotBuilt as reason:
        pytest.skip(f"no C++ layers here: {reason}")


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def cpp(built, request, monkeypatch):
    """The layers use the library, with this number of threads."""
    monkeypatch.setattr(library, "loaded", built)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on(built, monkeypatch):
    monkeypatch.setattr(library, "loaded", built)


def images(*shape, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) + shift
    return x.contiguous(memory_format=torch.channels_last)


def layer_and_input(name, batch=3, side=None):
    torch.manual_seed(0)
    layer = LAYERS[name]().to(memory_format=torch.channels_last)
    channels = next(layer.parameters()).shape[0] if name in ("up", "norm") else layer.in_channels
    side = side or SIDES[name]
    return layer, images(batch, channels, side, side)


def results(function, tensors, grad):
    """The output, and the gradients of all tensors."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, grad)]


def check(ours, plain, tensors, shape):
    """`ours` against `plain` in float64, with the error of `plain` in their own dtype as the measure."""
    grad = images(*shape, seed=1).to(tensors[0].dtype)
    exact = results(plain, [tensor.double() for tensor in tensors], grad.double())
    for number, (a, b, c) in enumerate(
        zip(results(ours, tensors, grad), results(plain, tensors, grad), exact, strict=True)
    ):
        assert_as_good_as_torch(a, b, c, CPU, f"result {number}")


# --- Against float64 --------------------------------------------------------------------------------------
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (1, 5, 7), (3, 16, 9), (2, 33, 64)])
@pytest.mark.parametrize("out", convolution.FEW)
def test_the_convolution_to_an_image_is_as_exact_as_pytorchs(cpp, out, batch, height, width, channels):
    x, weight, bias = images(batch, channels, height, width), images(out, channels, 3, 3), torch.ones(out)
    assert convolution.takes_few(x, weight)
    check(
        convolution.few,
        lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1),
        [x, weight, bias],
        (batch, out, height, width),
    )


@pytest.mark.parametrize("channels", [*WIDTHS, 300])
@pytest.mark.parametrize("dtype", batch_norm.DTYPES)
@pytest.mark.parametrize("shift", [0.0, 300.0], ids=["", "large mean"])
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 2, 1), (1, 5, 7), (3, 16, 9), (2, 33, 64)])
def test_batch_norm_is_as_exact_as_pytorchs(cpp, batch, height, width, shift, dtype, channels):
    x = images(batch, channels, height, width, shift=shift)
    weight, bias = images(2, channels, 1, 1, seed=2).flatten(1)
    x = x.to(dtype)
    assert batch_norm.takes(x, weight)
    check(
        lambda *t: batch_norm.batch_norm_leaky_relu(*t, 1e-5, 0.01)[0],
        lambda x, w, b: F.leaky_relu(F.batch_norm(x, None, None, w, b, True, 0.1, 1e-5), 0.01),
        [x, weight, bias],
        x.shape,
    )


def test_bfloat16_is_float32_rounded_as_by_torch(cpp):
    """Bit for bit, with NaN: only loads and stores differ."""
    x, grad = (images(3, 5, 16, 9, seed=seed).bfloat16() for seed in (0, 1))
    x[2, 1, 3, 3] = math.nan
    y, factors, mean, variance = batch_norm.forward(x, torch.ones(5), torch.zeros(5), 1e-5, 0.01)
    wide = batch_norm.forward(x.float(), torch.ones(5), torch.zeros(5), 1e-5, 0.01)
    gradients = batch_norm.backward(grad, x, factors, mean, 0.01)
    wide_gradients = batch_norm.backward(grad.float(), x.float(), factors, mean, 0.01)
    for narrow, rounded in ((y, wide[0].bfloat16()), (gradients[0], wide_gradients[0].bfloat16())):
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow, rounded, rtol=0, atol=0, equal_nan=True)
    for a, b in zip((factors, mean, variance, *gradients[1:]), (*wide[1:], *wide_gradients[1:]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8])
def test_deep_layers_are_as_exact_as_pytorchs(cpp, side, batch):
    x, weight = images(batch, 33, side, side), images(40, 33, 3, 3)
    assert convolution.takes_deep(x, weight, transposed=False)
    half = (side + 1) // 2
    check(
        lambda x, weight: convolution.deep(x, weight, False),
        lambda x, weight: F.conv2d(x, weight, None, 2, 1),
        [x, weight],
        (batch, 40, half, half),
    )
    codes = images(batch, 40, half, half)
    assert convolution.takes_deep(codes, weight, transposed=True)
    grow = side - (2 * half - 1)
    check(
        lambda x, weight: convolution.deep(x, weight, True, grow),
        lambda x, weight: F.conv_transpose2d(x, weight, None, 2, 1, grow),
        [codes, weight],
        (batch, 33, side, side),
    )


def test_running_statistics_are_pytorchs(cpp):
    ours = BatchNormLeakyReLU(5)
    theirs = nn.BatchNorm2d(5)
    for seed in range(3):
        x = images(4, 5, 6, 6, seed=seed, shift=2.0)
        ours(x), theirs(x)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    assert ours.num_batches_tracked == 0


# --- Special values ---------------------------------------------------------------------------------------
def test_batch_norm_of_one_pixel_is_refused_as_by_pytorch(on):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNormLeakyReLU(5)(images(1, 5, 1, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 2, 3, 3)], ids=["first", "inside"])
@pytest.mark.parametrize("name", LAYERS)
def test_nan_and_infinity_stand_where_pytorch_has_them(on, name, place, value, monkeypatch):
    layer, x = layer_and_input(name)
    place = tuple(min(i, size - 1) for i, size in zip(place, x.shape, strict=True))
    x[place] = value
    ours = layer(x)
    monkeypatch.setattr(launch, "ENABLED", False)
    assert same_places(ours, layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_goes_to_pytorch(on, name):
    layer, x = layer_and_input(name)
    assert layer(x[:0]).shape[0] == 0


# --- The layers -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYERS)
def test_equal_inputs_give_equal_bits(cpp, name):
    layer, x = layer_and_input(name, batch=5)
    runs = []
    for _ in range(3):
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        runs.append([y, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


OTHER = {
    "contiguous": (lambda layer: layer, lambda x: x.contiguous()),
    "float64": (lambda layer: layer.double(), lambda x: x.double()),
    "bfloat16": (lambda layer: layer.bfloat16(), lambda x: x.bfloat16()),
    "evaluation": (lambda layer: layer.eval(), lambda x: x),
}


@pytest.mark.parametrize("kind", OTHER)
@pytest.mark.parametrize("name", LAYERS)
def test_other_inputs_get_pytorchs_bits(on, name, kind, monkeypatch):
    layer, x = layer_and_input(name)
    change_layer, change = OTHER[kind]
    layer, x = change_layer(layer), change(x)
    expected = layer(x)
    for module in (convolution._Few, convolution._Deep, batch_norm._BatchNormLeakyReLU):
        monkeypatch.setattr(module, "apply", None)  # an error if it were called
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "norm"])
def test_convolutions_under_autocast_go_to_pytorch(on, name):
    layer, x = layer_and_input(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_batch_norm_under_autocast_is_pytorchs(on, value, monkeypatch):
    """Also its running statistics, and NaN where PyTorch has NaN."""
    x = images(3, 5, 7, 7).bfloat16()
    if value is not None:
        x[1, 2, 3, 3] = value
    layers = [BatchNormLeakyReLU(5), BatchNormLeakyReLU(5)]
    outputs = []
    for layer, enabled in zip(layers, (True, False), strict=True):
        monkeypatch.setattr(launch, "ENABLED", enabled)
        assert batch_norm.takes(x, layer.weight) == enabled
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        (y.float() ** 2).sum().backward()
        outputs.append([y, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    assert outputs[0][0].dtype == torch.bfloat16
    for ours, plain in zip(*outputs, strict=True):
        assert ours.dtype == plain.dtype
        assert same_places(ours, plain)
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_and_second_derivatives_are_pytorchs(on, name, monkeypatch):
    layer, x = layer_and_input(name)
    buffers = {key: value.clone() for key, value in layer.named_buffers()}
    layer.track_running_stats = False  # a transform cannot change them

    def penalty():
        """The gradient of a gradient's norm: wrong if the first gradient carries no graph."""
        x_ = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x_).square().sum(), x_, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x_, *layer.parameters()], allow_unused=True)

    def tangent():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent

    ours, slope = penalty(), tangent()
    monkeypatch.setattr(launch, "ENABLED", False)
    for a, b in zip(ours, penalty(), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    assert torch.allclose(slope, tangent())
    layer.load_state_dict(buffers, strict=False)


@pytest.mark.parametrize("frozen", ["input", "weights"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_that_nobody_wants_are_left_out(on, name, frozen):
    layer, x = layer_and_input(name)
    x.requires_grad_(frozen == "weights")
    layer.requires_grad_(frozen == "input")
    layer(x).sum().backward()
    assert (x.grad is None) == (frozen == "input")
    assert all((p.grad is None) == (frozen == "weights") for p in layer.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_is_eager(on, name):
    layer, x = layer_and_input(name)
    outputs = []
    for module in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        x_ = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = module(x_)
        y.square().sum().backward()
        outputs.append([y, x_.grad, *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operators_pass_opcheck(on):
    x, weight, bias = images(2, 5, 4, 3), images(3, 5, 3, 3), torch.randn(3)
    torch.library.opcheck(convolution.convolution, (x, weight, bias))
    torch.library.opcheck(convolution.weight_gradient, (images(2, 3, 4, 3), x))
    for dtype in batch_norm.DTYPES:
        arguments = (x.to(dtype), torch.ones(5), torch.zeros(5), 1e-5, 0.01)
        torch.library.opcheck(batch_norm.forward, arguments)
        _, factors, mean, _ = batch_norm.forward(*arguments)
        grad = images(2, 5, 4, 3).to(dtype)
        torch.library.opcheck(batch_norm.backward, (grad, x.to(dtype), factors, mean, 0.01))


# --- The build --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("compiler", "text"), [("/nonexistent", "need a C\\+\\+ compiler"), ("false", "false failed")]
)
def test_without_a_compiler_the_reason_is_given(compiler, text, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(library.NotBuilt, match=text):
        library.load()


def test_another_processor_gets_none(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(library.NotBuilt, match="AVX2"):
        library.load()


def test_a_damaged_library_is_built_again(tmp_path, monkeypatch, built):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    architecture = library.ARCHITECTURES[torch.backends.cpu.get_cpu_capability()]
    path = library.library_path(architecture)
    path.parent.mkdir()
    path.write_bytes(b"")
    with pytest.raises(library.NotBuilt):
        library.load()
    assert isinstance(library.load(), ctypes.CDLL)


@pytest.mark.slow
def test_two_processes_may_build_at_once(tmp_path, monkeypatch, built):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "from bvae.kernels.cpu import library; print(library.load()._name)"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parent.parent
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = {process.communicate()[0].strip() for process in processes}
    assert len(names) == 1
    assert [file.name for file in (tmp_path / "bvae").iterdir()] == [Path(names.pop()).name]


def test_without_a_home_folder_the_layers_are_pytorchs(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user without a passwd line
    with pytest.raises(library.NotBuilt, match="no home folder"):
        library.load()
