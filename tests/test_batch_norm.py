"""BatchNormLeakyReLU against PyTorch's BatchNorm2d and LeakyReLU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bvae import network_ops
from bvae.kernels import launch
from bvae.layers import BatchNormLeakyReLU


def test_outputs_gradients_and_statistics_are_pytorchs():
    torch.manual_seed(0)
    ours, theirs = BatchNormLeakyReLU(3), nn.BatchNorm2d(3)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5) * 2 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(a), F.leaky_relu(theirs(b), 0.01)
        assert torch.equal(y, expected)
        y.square().sum().backward(), expected.square().sum().backward()
        assert torch.equal(a.grad, b.grad)
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert torch.equal(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x), F.leaky_relu(theirs(x), 0.01))
    assert (ours.num_batches_tracked, theirs.num_batches_tracked) == (0, 3)


def test_weights_go_from_one_to_the_other():
    torch.manual_seed(0)
    ours, theirs = BatchNormLeakyReLU(3), nn.BatchNorm2d(3)
    theirs(torch.randn(4, 3, 5, 5))
    ours.load_state_dict(theirs.state_dict())
    assert ours.num_batches_tracked == 1
    assert torch.equal(ours.running_mean, theirs.running_mean)
    ours(torch.randn(4, 3, 5, 5))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.running_var, theirs.running_var)


@pytest.mark.parametrize(("network", "calls"), [(False, 0), (True, 1)])
def test_the_kernels_are_used_if_wanted(kernels, monkeypatch, network, calls):
    """In training, for channels_last; the rest is as before."""
    seen = []
    of_ops = network_ops.batch_norm_leaky_relu
    monkeypatch.setattr(
        network_ops, "batch_norm_leaky_relu", lambda *a, **k: seen.append(1) or of_ops(*a, **k)
    )
    monkeypatch.setattr(launch, "NETWORK", network)
    torch.manual_seed(0)
    ours, theirs = BatchNormLeakyReLU(3).to(kernels), nn.BatchNorm2d(3).to(kernels)
    x = torch.randn(4, 3, 5, 5, device=kernels) * 2 + 1
    for images in (x.contiguous(memory_format=torch.channels_last), x, x.double()):
        torch.testing.assert_close(ours.to(images)(images), F.leaky_relu(theirs.to(images)(images), 0.01))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(images), F.leaky_relu(theirs(images), 0.01))
    assert len(seen) == calls
