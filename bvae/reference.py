"""The mathematics of the objective in plain PyTorch: the specification of the kernels.

It runs on any device, is differentiated by autograd, and computes in float32, or in float64 if an argument is
float64. The tests and benchmarks compare the kernels with it, and training on a CPU uses it.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Likelihood = Literal["gaussian", "bernoulli"]
Activation = Literal["tanh", "sigmoid"] | None
Reduction = Literal["mean", "sum"]


class LossTerms(NamedTuple):
    """The objective and its parts: 0-d tensors, float32 (float64 if an argument is float64)."""

    loss: Tensor  # the number that training minimises
    recon: Tensor  # the reconstruction term, as it enters the loss
    kld: Tensor  # the batch's mean KL divergence, nats per image, unweighted
    capacity: Tensor  # C in nats; 0 if the objective has none


@dataclass(frozen=True)
class Objective:
    """The options of an objective; `bvae.ops.vae_loss` documents them.

    Raises:
        TypeError: an option that must be a number is not one.
        ValueError: an option out of its range, or an invalid combination.
    """

    kl_weight: float = 1.0
    max_capacity: float = 25.0  # nats
    capacity_iters: int = 10_000  # steps
    likelihood: Likelihood = "gaussian"
    activation: Activation = None
    reduction: Reduction = "mean"
    decoder_variance: float = 0.5

    def __post_init__(self) -> None:
        if self.likelihood not in ("gaussian", "bernoulli"):
            raise ValueError(f"likelihood must be 'gaussian' or 'bernoulli', got {self.likelihood!r}")
        if self.activation not in (None, "tanh", "sigmoid"):
            raise ValueError(f"activation must be None, 'tanh' or 'sigmoid', got {self.activation!r}")
        if self.likelihood == "bernoulli" and self.activation is not None:
            raise ValueError(
                f"a bernoulli likelihood takes logits: activation must be None, got {self.activation!r}"
            )
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}")
        for name in ("max_capacity", "capacity_iters", "decoder_variance"):
            if isinstance(getattr(self, name), Tensor):  # whose gradient would be lost without a word
                raise TypeError(
                    f"{name} must be a number, got a tensor: it is not learned; give float({name})"
                )
        if not 0 < self.decoder_variance < math.inf:
            raise ValueError(f"decoder_variance must be positive, got {self.decoder_variance}")
        if not 0 <= self.max_capacity < math.inf:
            raise ValueError(f"max_capacity must be at least 0 nats, got {self.max_capacity}")
        if not 1 <= self.capacity_iters < math.inf or self.capacity_iters % 1 != 0:
            raise ValueError(f"capacity_iters must be at least 1 step and whole, got {self.capacity_iters}")
        if isinstance(self.kl_weight, bool) or not isinstance(self.kl_weight, (int, float)):
            got = type(self.kl_weight).__name__
            raise TypeError(f"kl_weight must be a number or a 0-d float32 tensor, got {got}")

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The range of the decoder's output, to which uint8 pixels are scaled.

        [0, 1] for a Bernoulli likelihood or a sigmoid. Otherwise [-1, 1], for a tanh and for outputs that are
        already activated.
        """
        return (0.0 if self.likelihood == "bernoulli" or self.activation == "sigmoid" else -1.0), 1.0


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 if any of `tensors` is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def scale_pixels(images: Tensor, low: float = -1.0) -> Tensor:
    """uint8 pixels as float32 in [low, 1]; `low` is -1 or 0, the first number of a `pixel_range`.

    The shift comes before the factor, so that a fused multiply-add cannot change the rounding.
    """
    if low == 0.0:
        return images.float() * (1 / 255)
    return (images.float() - 127.5) * (1 / 127.5)


def reparam_kl(
    mu: Tensor, log_var: Tensor, eps: Tensor, *, clamp: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A sample of N(mu, exp(log_var)), and its KL divergence to N(0, I): Kingma and Welling (2014).

        z  = mu + exp(log_var / 2) * eps
        KL = 0.5 * (mu^2 + exp(log_var) - 1 - log_var)

    Args:
        mu, log_var: `[B, ...]`, of one shape.
        eps: standard normal noise of that shape.
        clamp: bounds of log_var; its gradient at and outside them is zero. diffusers has them.

    Returns:
        z in mu's shape and dtype; the KL per sample, `[B]`, nats; the batch's mean KL per dimension, nats.
    """
    dtype = compute_dtype(mu, log_var)
    mean, log_variance = mu.to(dtype), log_var.to(dtype)
    if clamp is not None:  # torch.clamp's gradient at the bounds themselves depends on torch's version
        low, high = clamp
        inside = (log_variance > low) & (log_variance < high)
        log_variance = torch.where(inside, log_variance, log_variance.detach().clamp(low, high))
    z = mean + torch.exp(0.5 * log_variance) * eps
    kl = 0.5 * (mean * mean + torch.exp(log_variance) - 1 - log_variance)
    return z.to(mu.dtype), kl.flatten(1).sum(1), kl.mean(0)


def capacity_at(step: Tensor, max_capacity: float, capacity_iters: int) -> Tensor:
    """C = clamp(max_capacity / capacity_iters * step, 0, max_capacity), nats: Burgess et al. (2018)."""
    return (step.float() * (max_capacity / capacity_iters)).clamp(0.0, max_capacity)


def vae_loss(
    recon: Tensor,
    target: Tensor,
    kl: Tensor,
    objective: Objective,
    *,
    step: Tensor | None = None,
    kl_scale: Tensor | None = None,
) -> LossTerms:
    """The beta-VAE's objectives; `bvae.ops.vae_loss` documents the arguments.

    without step: loss = recon + weight * kld             Higgins et al. (2017), equation 4
    with step:    loss = recon + weight * |kld - C|       Burgess et al. (2018), equation 8

    The weight is the objective's kl_weight, times kl_scale (a 0-d tensor) if it is given.
    """
    dtype = compute_dtype(recon, target, kl)
    x = recon.to(dtype)
    if target.dtype == torch.uint8:
        y = scale_pixels(target, objective.pixel_range[0]).to(dtype)
    else:
        y = target.to(dtype)
    if objective.likelihood == "bernoulli":
        if target.dtype != torch.uint8:  # make a wrong target visible without a sync
            y = torch.where((y < 0) | (y > 1), torch.nan, y)
        error = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    else:
        if objective.activation is not None:
            x = torch.tanh(x) if objective.activation == "tanh" else torch.sigmoid(x)
        error = (x - y).square() / (2 * objective.decoder_variance)
    recon_term = error.mean() if objective.reduction == "mean" else error.flatten(1).sum(1).mean()
    kld = kl.to(dtype).mean()
    weight = objective.kl_weight if kl_scale is None else objective.kl_weight * kl_scale
    if step is None:
        return LossTerms(recon_term + weight * kld, recon_term, kld, torch.zeros_like(kld))
    capacity = capacity_at(step, objective.max_capacity, objective.capacity_iters).to(dtype)
    return LossTerms(recon_term + weight * (kld - capacity).abs(), recon_term, kld, capacity)
