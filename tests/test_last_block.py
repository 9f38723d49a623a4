"""last_block: the kernels against float64 and against the blocks' own layers; all likelihoods, misuse."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_good_as_torch
from torch import Tensor
from torch.library import opcheck

from bvae import ops, reference
from bvae.kernels import last_block, launch
from bvae.objective import Objective

CPU = torch.device("cpu")
SHAPES = {  # images, channels, height, width, output channels
    "1x1x1x2 to 1": (1, 1, 1, 2, 1),
    "2x32x9x16 to 3": (2, 32, 9, 16, 3),
    "3x17x5x41 to 3": (3, 17, 5, 41, 3),
    "1x64x7x65 to 1": (1, 64, 7, 65, 1),
}
OBJECTIVES = {
    "gaussian": Objective(activation="tanh"),
    "activated": Objective(),
    "laplace": Objective(likelihood="laplace", activation="sigmoid"),
    "logistic": Objective(likelihood="logistic", activation="tanh", decoder_scale=0.1),
    "bernoulli": Objective(likelihood="bernoulli"),
}
NAMES = ("errors", "squares", "x", "norm_weight", "norm_bias", "weight", "bias")


def arguments(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> list[Tensor]:
    """x, norm_weight, norm_bias, weight, bias, all leaves, and a target of uint8 in [B, H, W, C]."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width, out = shape
    x = torch.randn(batch, channels, height, width, generator=generator).to(device, dtype)
    x = x.to(memory_format=torch.channels_last)
    norm = 1 + 0.3 * torch.randn(2, channels, generator=generator)
    weight = torch.randn(out, channels, 3, 3, generator=generator) / (3 * channels**0.5)
    bias = torch.randn(out, generator=generator)
    leaves = [t.to(device).requires_grad_() for t in (x, norm[0], norm[1] - 1, weight, bias)]
    pixels = torch.randint(256, (batch, height, width, out), generator=generator, dtype=torch.uint8)
    return [*leaves, pixels.to(device).permute(0, 3, 1, 2)]


def results(function, leaves: list[Tensor], target: Tensor, objective: Objective) -> list[Tensor]:
    """Outputs and gradients; each image's error counts differently."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    errors, squares, *_ = function(*leaves, target, objective)
    scales = torch.linspace(1.0, 2.0, len(errors), device=errors.device)
    (errors * scales).sum().backward()
    return [t.detach().cpu() for t in (errors, squares, *(leaf.grad for leaf in leaves))]


def elements(x, norm_weight, norm_bias, weight, bias, target, objective) -> tuple[Tensor, Tensor]:
    """Errors and squared errors [B, ...] of the layers one after another, in x's dtype between them."""
    y = F.batch_norm(x, None, None, norm_weight.to(x.dtype), norm_bias.to(x.dtype), True)
    recon = F.conv2d(F.leaky_relu(y), weight.to(x.dtype), bias.to(x.dtype), padding=1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = reference.scale_pixels(target, objective.pixel_range[0]).to(dtype)
    errors = reference.pixel_errors(recon.to(dtype), y, objective)
    activate = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, None: lambda v: v}
    activation = "sigmoid" if objective.likelihood == "bernoulli" else objective.activation
    return errors.flatten(1), (activate[activation](recon.to(dtype)) - y).square().flatten(1)


def layers(*arguments) -> tuple[Tensor, ...]:
    return tuple(each.sum(1) for each in elements(*arguments))


def compare(device: torch.device, shape, dtype: torch.dtype, objective: Objective) -> None:
    *leaves, target = arguments(shape, dtype)
    ours = results(ops.last_block, [leaf.to(device) for leaf in leaves], target.to(device), objective)
    torchs = results(layers, leaves, target, objective)
    exact = results(layers, [leaf.double() for leaf in leaves], target, objective)
    assert [t.dtype for t in ours] == [torch.float32] * 2 + [dtype] + [torch.float32] * 4
    with torch.no_grad():
        rounded = elements(*leaves, target, objective)
        true = elements(*(leaf.double() for leaf in leaves), target, objective)
    for a, b, found in zip(rounded, true, ours, strict=False):  # torch's roundings may cancel in a sum
        assert ((found - b.sum(1)).abs() <= (a - b).abs().sum(1) + 2**-22 * b.sum(1).abs()).all()
    for name, *triple in list(zip(NAMES, ours, torchs, exact, strict=True))[2:]:
        if name == "x" and shape[0] * shape[2] * shape[3] == 2:
            continue  # two numbers per channel: the exact gradient is the last bits of a zero
        assert_as_good_as_torch(*triple, device, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_as_good_as_the_layers(kernels, shape, dtype):
    assert last_block.takes(*arguments(shape, dtype)[0:4:3])
    compare(kernels, shape, dtype, OBJECTIVES["gaussian"])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "gaussian"])
def test_every_likelihood(kernels, name):
    compare(kernels, SHAPES["2x32x9x16 to 3"], torch.bfloat16, OBJECTIVES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_reference_is_as_good_as_the_layers(objective, dtype):
    compare(CPU, SHAPES["3x17x5x41 to 3"], dtype, objective)


def test_probabilities_are_those_of_the_reference(kernels):
    x, norm_weight, norm_bias, weight, bias, target = arguments((2, 16, 4, 4, 1), torch.bfloat16, kernels)
    objective = Objective(likelihood="bernoulli", from_logits=False)
    tensors = x.detach(), norm_weight, norm_bias, weight.detach() * 0.05, torch.full_like(bias, 0.5)
    ours = ops.last_block(*tensors, target, objective)
    theirs = reference.last_block(*tensors, target, objective)
    for a, b in zip(ours, theirs[:2], strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 2, 2, 129, 3), torch.bfloat16),
        ((1, 65, 2, 4, 3), torch.bfloat16),
        ((2, 4, 3, 3, 2), torch.float16),
        ((2, 4, 3, 3, 3), torch.float32),
    ],
    ids=str,
)
def test_what_does_not_fit_runs_the_reference(kernels, monkeypatch, shape, dtype):
    *leaves, target = arguments(shape, dtype, kernels)
    assert not last_block.takes(leaves[0], leaves[3])
    fallen = results(ops.last_block, leaves, target, OBJECTIVES["gaussian"])
    monkeypatch.setattr(launch, "ENABLED", False)
    expected = results(ops.last_block, leaves, target, OBJECTIVES["gaussian"])
    assert all(torch.equal(a, b) for a, b in zip(fallen, expected, strict=True))


def test_running_statistics_and_a_target_of_any_layout(kernels):
    *leaves, target = arguments((2, 16, 5, 6, 3), torch.bfloat16, kernels)
    plain = ops.last_block(*leaves, target, OBJECTIVES["gaussian"])
    running = [torch.zeros(16, device=kernels) for _ in range(2)]
    layouts = target.contiguous(), target.permute(0, 2, 3, 1), reference.scale_pixels(target)
    for each in layouts:
        other = ops.last_block(*leaves, each, OBJECTIVES["gaussian"], *running, momentum=1.0)
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    var, mean = torch.var_mean(leaves[0].float(), (0, 2, 3))
    torch.testing.assert_close(running, [mean, var])


def test_equal_inputs_give_equal_bits_and_counters_of_zero(kernels, monkeypatch):
    lent = []

    def lend(count: int, device: torch.device) -> Tensor:
        lent.append(torch.zeros(count, dtype=torch.int32, device=device))
        return lent[-1]

    monkeypatch.setattr(last_block, "completion_counters", lend)
    *leaves, target = arguments((2, 16, 40, 32, 1), torch.bfloat16, kernels)
    first, second = (results(ops.last_block, leaves, target, OBJECTIVES["gaussian"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [counters.tolist() for counters in lent] == [[0, 0], [0, 0]]


def test_opcheck(kernels):
    *leaves, target = arguments((2, 16, 3, 4, 1), torch.bfloat16, kernels)
    options = 1e-5, 0.01, "gaussian", "tanh", 1.0, -1.0
    opcheck(last_block.last_block, (*leaves, target, True, *options))
    outputs = last_block.last_block(*leaves, target, True, *options)
    saved = *(leaf.detach() for leaf in leaves[:4]), *outputs[2:6], outputs[0].detach()
    opcheck(last_block.last_block_backward, (*saved, 2.0, 0.01))


def test_compiled(kernels):
    *leaves, target = arguments((2, 16, 3, 4, 3), torch.bfloat16, kernels)
    compiled = torch.compile(ops.last_block, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        results(compiled, leaves, target, OBJECTIVES["gaussian"]),
        results(ops.last_block, leaves, target, OBJECTIVES["gaussian"]),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_without_gradients_none_are_written(kernels):
    *leaves, target = arguments((2, 16, 3, 4, 3), torch.bfloat16, kernels)
    with torch.no_grad():
        errors, squares = ops.last_block(*leaves, target, OBJECTIVES["gaussian"])
    expected = ops.last_block(*leaves, target, OBJECTIVES["gaussian"])
    assert torch.equal(errors, expected[0].detach())
    assert torch.equal(squares, expected[1])


def test_transforms_are_the_references_and_a_second_derivative_is_refused(kernels, monkeypatch):
    *leaves, target = arguments((2, 4, 3, 3, 1), torch.bfloat16, kernels)

    def function(bias: Tensor) -> Tensor:
        return ops.last_block(*leaves[:4], bias, target, OBJECTIVES["gaussian"])[0].sum()

    with pytest.raises(RuntimeError, match="bvae::last_block has no second derivative"):
        torch.autograd.grad(function(leaves[4]), leaves[4], create_graph=True)
    found = torch.func.jacfwd(function)(leaves[4])
    monkeypatch.setattr(launch, "ENABLED", False)
    torch.testing.assert_close(found, torch.func.jacfwd(function)(leaves[4]))


def test_misuse():
    *leaves, target = arguments((2, 4, 3, 3, 3), torch.float32)
    objective = Objective(decoder_variance=torch.ones(3, 1, 1))
    with pytest.raises(ValueError, match="must be one number for the last block, got float32"):
        ops.last_block(*leaves, target, objective)
    with pytest.raises(ValueError, match=r"weight must be \[channels, 4, 3, 3\], got"):
        ops.last_block(*leaves[:3], leaves[3][:, :3], leaves[4], target, Objective())
    with pytest.raises(ValueError, match=r"bias must be \[3\]"):
        ops.last_block(*leaves[:4], leaves[4][:1], target, Objective())
    with pytest.raises(ValueError, match="target must have"):
        ops.last_block(*leaves, target[:, :2], Objective())
