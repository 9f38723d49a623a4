"""The beta-VAE's objectives as modules: the part that other VAE code can take."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from bvae import ops, reference
from bvae.reference import Activation, Likelihood, LossTerms, Reduction

__all__ = ["BetaLoss", "CapacityLoss", "LossTerms"]

KLWeight = float | Literal["m_over_n"]


class _Objective(nn.Module):
    """What the two objectives share: the reconstruction term's options and the weight of the KL."""

    def __init__(
        self,
        kl_weight: KLWeight,
        likelihood: Likelihood,
        activation: Activation,
        reduction: Reduction,
        decoder_variance: float,
    ) -> None:
        super().__init__()
        ops.check_objective(likelihood, activation, reduction, decoder_variance)
        if kl_weight != "m_over_n" and not (isinstance(kl_weight, (int, float)) and kl_weight >= 0):
            raise ValueError(f"kl_weight must be 'm_over_n' or a number of at least 0, got {kl_weight!r}")
        self.kl_weight: KLWeight = kl_weight
        self.likelihood: Likelihood = likelihood
        self.activation: Activation = activation
        self.reduction: Reduction = reduction
        self.decoder_variance = decoder_variance

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The range to which uint8 targets are scaled: that of the decoder's output."""
        return reference.pixel_range(self.likelihood, self.activation)

    def _kl_and_weight(self, recon: Tensor, kl: Tensor, log_var: Tensor | None) -> tuple[Tensor, float]:
        """kl `[B]` and its weight, from (kl) or from (mu, log_var)."""
        if log_var is not None:
            mu, kl = kl, ops.gaussian_kl(kl, log_var)
        if self.kl_weight != "m_over_n":
            return kl, float(self.kl_weight)
        if log_var is None or recon.dim() != 4:
            raise ValueError(
                "kl_weight='m_over_n' needs mu and log_var, whose size is M, and recon [B, C, H, W], "
                f"whose H x W is N; got recon {list(recon.shape)} and kl {list(kl.shape)}: give a number"
            )
        return kl, math.prod(mu.shape[1:]) / math.prod(recon.shape[2:])

    def extra_repr(self) -> str:
        return (
            f"kl_weight={self.kl_weight!r}, likelihood={self.likelihood!r}, activation={self.activation!r}, "
            f"reduction={self.reduction!r}, decoder_variance={self.decoder_variance}"
        )


class BetaLoss(_Objective):
    """loss = recon + beta * kl_weight * kld: Higgins et al. (2017); beta = 1 is the VAE.

    Args:
        beta: at least 0.
        kl_weight: 'm_over_n' is M / N, latent dimensions over pixels (H x W), to go with a mean squared
            error; a number is taken as it is: 1 with `reduction="sum"` is the paper's objective.
        likelihood, activation, reduction, decoder_variance: see `bvae.ops.vae_loss`.
    """

    def __init__(
        self,
        beta: float = 1.0,
        kl_weight: KLWeight = "m_over_n",
        *,
        likelihood: Likelihood = "gaussian",
        activation: Activation = None,
        reduction: Reduction = "mean",
        decoder_variance: float = 0.5,
    ) -> None:
        super().__init__(kl_weight, likelihood, activation, reduction, decoder_variance)
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta must be at least 0, got {beta}")
        self.beta = beta

    def forward(self, recon: Tensor, target: Tensor, kl: Tensor, log_var: Tensor | None = None) -> LossTerms:
        """`(recon, target, kl)` with kl `[B]`, or `(recon, target, mu, log_var)`: see `bvae.ops.vae_loss`."""
        kl, weight = self._kl_and_weight(recon, kl, log_var)
        return ops.vae_loss(
            recon,
            target,
            kl,
            kl_weight=self.beta * weight,
            likelihood=self.likelihood,
            activation=self.activation,
            reduction=self.reduction,
            decoder_variance=self.decoder_variance,
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, {super().extra_repr()}"


class CapacityLoss(_Objective):
    """loss = recon + gamma * kl_weight * |kld - C|, C rising linearly to max_capacity: Burgess et al. (2018).

    The step counter `step`, 0-d int64, is part of the state_dict and counts the forward passes in training
    mode: the first has step 1. In eval mode it stands still, and C is that of the last training step.

    Args:
        gamma: at least 0.
        max_capacity: C's last value in nats, reached at step `capacity_iters`.
        kl_weight: see `BetaLoss`.
        likelihood, activation, reduction, decoder_variance: see `bvae.ops.vae_loss`.
    """

    step: Tensor

    def __init__(
        self,
        gamma: float = 10.0,
        max_capacity: float = 25.0,
        capacity_iters: int = 10_000,
        kl_weight: KLWeight = "m_over_n",
        *,
        likelihood: Likelihood = "gaussian",
        activation: Activation = None,
        reduction: Reduction = "mean",
        decoder_variance: float = 0.5,
    ) -> None:
        super().__init__(kl_weight, likelihood, activation, reduction, decoder_variance)
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma must be at least 0, got {gamma}")
        ops.check_capacity(max_capacity, capacity_iters)
        self.gamma = gamma
        self.max_capacity = max_capacity
        self.capacity_iters = capacity_iters
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, recon: Tensor, target: Tensor, kl: Tensor, log_var: Tensor | None = None) -> LossTerms:
        """`(recon, target, kl)` with kl `[B]`, or `(recon, target, mu, log_var)`: see `bvae.ops.vae_loss`."""
        kl, weight = self._kl_and_weight(recon, kl, log_var)
        if self.training:
            self.step.add_(1)
        return ops.vae_loss(
            recon,
            target,
            kl,
            kl_weight=self.gamma * weight,
            step=self.step,
            max_capacity=self.max_capacity,
            capacity_iters=self.capacity_iters,
            likelihood=self.likelihood,
            activation=self.activation,
            reduction=self.reduction,
            decoder_variance=self.decoder_variance,
        )

    def extra_repr(self) -> str:
        schedule = (
            f"gamma={self.gamma}, max_capacity={self.max_capacity}, capacity_iters={self.capacity_iters}"
        )
        return f"{schedule}, {super().extra_repr()}"
