"""Structural similarity of images and their reconstructions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bvae.errors import UsageError

WINDOW, SIGMA = 11, 1.5  # of the Gaussian that weighs a pixel's surroundings
K1, K2 = 0.01, 0.03


def ssim(mean: Tensor, target: Tensor, peak: float) -> float:
    """The mean structural similarity of images (Wang et al. 2004), computed in float64.

    The published settings: a Gaussian window of 11 x 11 pixels with a standard deviation of 1.5, K1 0.01 and
    K2 0.03. Windows that would reach beyond the image are left out, and the channels are averaged.

    Args:
        mean: [N, C, H, W], the decoder's output after its activation; H and W at least 11.
        target: the images, of the same shape.
        peak: the range of the pixels, 1 for [0, 1] and 2 for [-1, 1].

    Returns:
        The mean over images, -1 to 1; 1 if all are exact.

    Raises:
        UsageError: different shapes, no images, or images smaller than the window.

    >>> import torch
    >>> from bvae.metrics import ssim
    >>> images = torch.rand(2, 3, 32, 32)
    >>> round(ssim(images, images, peak=1), 6)
    1.0
    """
    if mean.shape != target.shape or mean.dim() != 4 or not len(mean):
        raise UsageError(
            f"means {list(mean.shape)} and images {list(target.shape)} must both be [N, C, H, W]"
        )
    if min(mean.shape[2:]) < WINDOW:
        raise UsageError(f"images must have at least {WINDOW} x {WINDOW} pixels, got {list(mean.shape[2:])}")
    x, y = (images.double().flatten(0, 1)[:, None] for images in (mean, target))
    x_mean, y_mean = _blur(x), _blur(y)
    x_var, y_var = _blur(x * x) - x_mean.square(), _blur(y * y) - y_mean.square()
    covariance = _blur(x * y) - x_mean * y_mean
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    brightness = (2 * x_mean * y_mean + c1) / (x_mean.square() + y_mean.square() + c1)
    return (brightness * (2 * covariance + c2) / (x_var + y_var + c2)).mean().item()


def _blur(x: Tensor) -> Tensor:
    """The weighted mean around each pixel of [N, 1, H, W], where the whole window lies in the image."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = (-offsets.square() / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(x, weights[None, None, :, None]), weights[None, None, None, :])
