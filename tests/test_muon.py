"""Muon against its formula in float64, against torch.optim.Muon and Adam, and with a loss scaler."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from bvae.config import TrainingConfig
from bvae.training import muon
from bvae.training.muon import Muon, orthogonalise
from bvae.training.optimizer import build_optimizer

SHAPES = [(3, 288), (32, 288), (288, 4), (27, 16), (128, 7), (1, 5), (5, 1), (1, 1), (64, 64)]


def rate(value):
    return torch.tensor(value)


def newton_schulz(matrix):
    """Five rounds as the source writes them, in float64."""
    x = matrix.double()
    x = x.T if len(x) > x.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def ill_conditioned(rows, columns):
    """Singular values from 1 down to 1e-6."""
    smaller = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(size, smaller, dtype=torch.float64))[0] for size in (rows, columns))
    return (u * torch.logspace(0, -6, smaller, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("make", [torch.randn, ill_conditioned], ids=["random", "ill-conditioned"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float64, 1e-5)], ids=str)
def test_matrices_of_all_shapes_at_once_are_as_each_alone_in_float64(make, dtype, tolerance):
    torch.manual_seed(0)
    matrices = [make(*shape) for shape in SHAPES]
    for matrix, result in zip(matrices, orthogonalise([m.to(dtype) for m in matrices]), strict=True):
        expected = newton_schulz(matrix)
        assert result.dtype == dtype
        assert result.shape == matrix.shape
        assert (result - expected).norm() <= tolerance * expected.norm()


def test_singular_values_become_about_one_and_directions_stay():
    torch.manual_seed(0)
    matrix = torch.randn(20, 50)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ orthogonalise([matrix])[0] @ v.T
    assert 0.68 < rotated.diagonal().min() <= rotated.diagonal().max() < 1.14
    torch.testing.assert_close(rotated, rotated.diagonal().diag(), atol=1e-4, rtol=0)


def test_filters_need_half_the_arithmetic_of_newton_schulz_as_written():
    """[64, 32 x 9] as every other layer's: 4.5 columns per row."""
    flops = []
    for form in (muon._by_squares, muon._by_products):
        with FlopCounterMode(display=False) as counter:
            form(torch.empty(2, 64, 288, device="meta"))
        flops.append(counter.get_total_flops())
    assert flops[1] == 2 * 5 * 2 * 64 * (2 * 64 * 288 + 64 * 64)  # two matrices, five rounds
    assert flops[0] < 0.55 * flops[1]


def test_a_matrix_of_zeros_stays_zero():
    assert (orthogonalise([torch.zeros(3, 4)])[0] == 0).all()


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_matrix_is_updated_as_by_torch(shape, weight_decay):
    """torch's computes in bfloat16, so the tolerance is bfloat16's."""
    torch.manual_seed(0)
    ours, torchs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": rate(0.1), "weight_decay": weight_decay}
    optimizers = Muon([ours], adam_lr=rate(1.0), **options), torch.optim.Muon([torchs], **options)
    for _ in range(4):
        gradient = torch.randn(shape)
        for weight, optimizer in zip((ours, torchs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    moved = torchs.detach() - 1
    assert (ours - torchs).norm() <= 0.03 * moved.norm()


def test_a_filter_is_updated_as_the_matrix_of_its_channels():
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3)
    filters = nn.Parameter(weight.clone(memory_format=torch.channels_last))
    matrix = nn.Parameter(weight.reshape(8, 36).clone())
    optimizer = Muon([filters, matrix], lr=rate(0.1), adam_lr=rate(1.0))
    for _ in range(3):
        gradient = torch.randn(8, 4, 3, 3)
        filters.grad, matrix.grad = gradient.clone(), gradient.reshape(8, 36)
        optimizer.step()
    torch.testing.assert_close(filters.flatten(1), matrix)
    assert filters.is_contiguous(memory_format=torch.channels_last)


def test_other_parameters_get_adam_bit_for_bit():
    torch.manual_seed(0)
    start = torch.randn(7)
    ours, torchs, scalar = (nn.Parameter(value) for value in (start.clone(), start.clone(), torch.ones(())))
    optimizer = Muon([ours, scalar], lr=rate(9.0), adam_lr=rate(0.1), weight_decay=9.0)
    adam = torch.optim.Adam([torchs], torch.tensor(0.1), fused=True)
    for _ in range(5):
        ours.grad = torch.randn(7)
        torchs.grad = ours.grad.clone()
        optimizer.step(), adam.step()
    assert torch.equal(ours, torchs)
    assert scalar == 1  # it has no gradient


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (5, 3, 2, 2), (5,))]


def steps(optimizer, weights, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def test_a_saved_and_loaded_optimizer_goes_on_bit_for_bit():
    training = TrainingConfig(optimizer="muon", weight_decay=0.1)
    whole, part = parameters(), parameters()
    steps(build_optimizer(training, whole), whole, range(6))
    first = build_optimizer(training, part)
    steps(first, part, range(3))
    second = build_optimizer(training, part)
    second.load_state_dict(first.state_dict())
    steps(second, part, range(3, 6))
    assert all(map(torch.equal, whole, part))


def scaled_step(weights, optimizer, scaler, factor=1.0):
    optimizer.zero_grad()
    loss = sum((weight * weight.detach().cos()).sum() for weight in weights)
    scaler.scale(loss * factor).backward()
    scaler.step(optimizer)
    scaler.update()


def test_a_loss_scaler_changes_nothing_but_skips_infinite_gradients():
    """The scale is a power of two, so that scaled gradients have the same bits."""
    plain, scaled = parameters(), parameters()
    training = TrainingConfig(optimizer="muon", weight_decay=0.1)
    without, with_scaler = build_optimizer(training, plain), build_optimizer(training, scaled)
    off = torch.amp.GradScaler("cpu", enabled=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, 1.0, float("inf"), 1.0):
        if factor == 1.0:
            scaled_step(plain, without, off)
        scaled_step(scaled, with_scaler, scaler, factor)
    assert scaler.get_scale() == 512.0  # it has seen the infinite ones
    assert all(map(torch.equal, plain, scaled))


class NoReads(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in ("item", "__float__", "__bool__", "tolist"), f"{name} makes the host wait"
        return function(*args, **(kwargs or {}))


def test_an_update_reads_no_number_on_the_host():
    weights = parameters()
    optimizer = build_optimizer(TrainingConfig(optimizer="muon", weight_decay=0.1), weights)
    with NoReads():
        steps(optimizer, weights, range(2))


def test_both_rates_are_read_from_their_tensors():
    weights = parameters()
    optimizer = build_optimizer(TrainingConfig(optimizer="muon", muon_lr=0.05, lr=1e-3), weights)
    assert [group["lr"].item() for group in optimizer.param_groups] == pytest.approx([0.05, 1e-3])
    before = [weight.detach().clone() for weight in weights]
    for group in optimizer.param_groups:
        group["lr"].fill_(0.0)
    steps(optimizer, weights, [0])
    assert all(map(torch.equal, weights, before))


def test_a_model_of_vectors_alone_has_one_group():
    weight = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(TrainingConfig(optimizer="muon", lr=0.1), [weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_a_closure_computes_the_loss_first():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([weight], lr=rate(0.1), adam_lr=rate(0.1))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    assert (weight < 1).all()
