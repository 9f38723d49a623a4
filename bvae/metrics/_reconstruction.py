"""How close reconstructions are to their images."""

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from bvae.errors import UsageError


class Reconstruction(NamedTuple):
    """Means over images."""

    nats: float  # -log likelihood per image, without the Gaussian's constant
    mse: float  # per pixel and channel, in the images' range
    psnr: float  # dB; infinite if an image is exact


def reconstruction(
    mean: Tensor, target: Tensor, peak: float, variance: float | None = None
) -> Reconstruction:
    """Compare images with the decoder's means; all is computed in float64.

    The Bernoulli's and the Gaussian's likelihoods are those of Kingma & Welling 2014, "Auto-encoding
    variational Bayes", appendix C.

    Args:
        mean: [N, ...], the decoder's output after its activation.
        target: the images, of the same shape.
        peak: the range of the pixels, 1 for [0, 1] and 2 for [-1, 1].
        variance: of the Gaussian likelihood. None: a Bernoulli's, for pixels in [0, 1].

    Returns:
        nats, mse and psnr, means over images; nats and mse from 0, psnr infinite if an image is exact.

    Raises:
        ValueError: different shapes, no images, means that are not finite, or values outside [0, 1] with a
            Bernoulli.

    >>> import torch
    >>> from bvae.metrics import reconstruction
    >>> target = torch.tensor([[0.0, 1.0]])
    >>> [round(value, 2) for value in reconstruction(target * 0.8 + 0.1, target, peak=1)]
    [0.21, 0.01, 20.0]
    """
    if mean.shape != target.shape or not len(mean):
        raise UsageError(f"means {list(mean.shape)} and images {list(target.shape)} must have the same shape")
    mean, target = mean.double().flatten(1), target.double().flatten(1)
    if not mean.isfinite().all():
        raise UsageError("the decoder's output has values that are not finite")
    squared = (mean - target).square()
    if variance is not None:
        nats = squared.sum(1) / (2 * variance)
    elif min(mean.min(), target.min()) < 0 or max(mean.max(), target.max()) > 1:
        raise UsageError("a Bernoulli's means and pixels must be in [0, 1]: pass the Gaussian's variance")
    else:
        nats = binary_cross_entropy(mean, target, reduction="none").sum(1)
    psnr = 20 * math.log10(peak) - 10 * squared.mean(1).log10()
    return Reconstruction(nats.mean().item(), squared.mean().item(), psnr.mean().item())
