"""The optimizers against their formulas, after one step."""

import pytest
import torch
from torch import nn

from bvae.config import TrainingConfig
from bvae.training.optimizer import build_optimizer


@pytest.mark.parametrize("name", ["adam", "adagrad"])
def test_the_first_step_is_the_learning_rate_against_the_gradients_sign(name):
    """Both divide the gradient by its own size at first; later Adagrad's steps shrink, Adam's do not."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer(TrainingConfig(optimizer=name, lr=0.1), [weight])
    gradient, moved = torch.tensor([1.0, -2.0, 0.5]), []
    for _ in range(2):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        moved.append(weight.detach() - before)
    torch.testing.assert_close(moved[0], -0.1 * gradient.sign())
    torch.testing.assert_close(moved[1], moved[0] * (1 if name == "adam" else 0.5**0.5))


@pytest.mark.parametrize("name", ["adam", "adagrad"])
def test_weight_decay_pulls_at_weights_without_a_gradient(name):
    weight = nn.Parameter(torch.ones(1))
    optimizer = build_optimizer(TrainingConfig(optimizer=name, lr=0.1, weight_decay=0.5), [weight])
    weight.grad = torch.zeros(1)
    optimizer.step()
    assert weight.item() == pytest.approx(0.9)
