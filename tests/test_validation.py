"""The numbers of a validation, on models whose answers are known."""

import pytest
import torch
from torch import nn

from bvae.losses import BetaLoss
from bvae.pipelines.memory_loaders import choose_loader
from bvae.reference import scale_pixels
from bvae.training.validation import validate

IMAGES = torch.randint(256, (10, 8, 8, 3), dtype=torch.uint8)
X = scale_pixels(IMAGES.permute(0, 3, 1, 2))


class Oracle(nn.Module):
    """Answers every image with a fixed picture, or with the image itself; its posterior is N(1, I)."""

    latent_dim, input_shape, activation = 2, (3, 8, 8), "tanh"

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def scale(self, pixels):
        return scale_pixels(pixels)

    def encode_scaled(self, x):
        self.x = x
        return torch.ones(len(x), 2), torch.zeros(len(x), 2)

    def decode(self, z):
        return self.x if self.answer is None else self.answer.expand_as(self.x)

    def decode_raw(self, z):
        return torch.atanh(self.decode(z).clamp(-1 + 1e-6, 1 - 1e-6))


def validated(answer):
    data, _ = choose_loader(IMAGES, 4, 0, torch.device("cpu"), train=False, flip=False)
    return validate(Oracle(answer), BetaLoss(kl_weight=0.5, activation="tanh"), data, 0, None)


def test_a_perfect_model_explains_everything():
    result = validated(None)
    assert result.explained_variance == 1
    assert result.mse == pytest.approx(0, abs=1e-6)


def test_the_mean_image_explains_nothing():
    result = validated(X.mean(0))
    assert result.explained_variance == pytest.approx(0, abs=1e-6)
    assert result.mse == pytest.approx((X - X.mean(0)).square().mean().item(), rel=1e-5)


def test_kl_and_loss_are_averages_over_all_images():
    """KL(N(1, I) || N(0, I)) is 1/2 nat a latent; the last batch is smaller than the others."""
    result = validated(X.mean(0))
    assert result.kl_per_dim == pytest.approx([0.5, 0.5])
    assert result.kld == pytest.approx(1)
    assert result.loss == pytest.approx(result.mse + 0.5, rel=1e-5)
