"""The beta-VAE's objectives as modules, also for use in other VAE code."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bvae import ops
from bvae.kernels import launch
from bvae.reference import Activation, Likelihood, LossTerms, Objective, Reduction

__all__ = ["BetaLoss", "CapacityLoss", "LossTerms"]

KLWeight = float | Literal["m_over_n"]


def _is_weight(value: object) -> bool:
    """Whether `value` is a finite number of at least 0."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


class _Loss(nn.Module):
    """The common part of both objectives: the reconstruction term's options and the weight of the KL.

    The weight is beta or gamma times kl_weight. These attributes may be assigned at any time, in every step
    too, and between calls of a compiled function or replays of a captured graph. An assignment that changes
    the product writes it to a 0-d tensor (one launch, no sync), which the kernels read. A step without such
    an assignment launches nothing. On the reference path, or if the module is not on the device of its
    arguments, the weight is the Python number, which a captured graph freezes.
    """

    _weight: Tensor  # the product of the numbers; 'm_over_n' counts as 1, and multiplies in forward

    def __init__(self, factor: float, kl_weight: KLWeight, objective: Objective) -> None:
        super().__init__()
        self._factor, self._kl_weight, self._by_shape = factor, kl_weight, kl_weight == "m_over_n"
        self.register_buffer("_weight", torch.zeros((), dtype=torch.float32), persistent=False)
        self._set_factor(factor)
        self.kl_weight = kl_weight
        self.likelihood: Likelihood = objective.likelihood
        self.activation: Activation = objective.activation
        self.reduction: Reduction = objective.reduction
        self.decoder_variance = objective.decoder_variance

    def _objective(self, **options: Any) -> Objective:
        """The options as they are now, checked: each is an attribute that may be assigned."""
        return Objective(
            likelihood=self.likelihood,
            activation=self.activation,
            reduction=self.reduction,
            decoder_variance=self.decoder_variance,
            **options,
        )

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The range to which uint8 targets are scaled: that of the decoder's output."""
        return self._objective().pixel_range

    @property
    def kl_weight(self) -> KLWeight:
        """'m_over_n' or a number of at least 0."""
        return self._kl_weight

    @kl_weight.setter
    def kl_weight(self, value: KLWeight) -> None:
        if not _is_weight(value) and not (isinstance(value, str) and value == "m_over_n"):
            raise ValueError(f"kl_weight must be 'm_over_n' or a finite number of at least 0, got {value!r}")
        before, self._kl_weight = self._kl_weight, value
        self._by_shape = isinstance(value, str)  # so a compiled forward pass does not depend on the number
        if value != before:
            self._write_weight()

    def _set_factor(self, value: float) -> None:
        """Assign what the subclass calls beta or gamma, and has checked."""
        before, self._factor = self._factor, value
        if value != before:
            self._write_weight()

    def _number(self) -> float:
        return float(self._factor) * (1.0 if self._by_shape else float(self._kl_weight))

    def _write_weight(self) -> None:
        with torch.no_grad():
            self._weight.fill_(self._number())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Loss":
        """Move the module as usual; the weight stays float32, and is written again after `to_empty`."""
        super()._apply(fn, recurse)
        self._weight = self._weight.float()
        self._write_weight()
        return self

    def _kl_and_ratio(self, recon: Tensor, kl: Tensor, log_var: Tensor | None) -> tuple[Tensor, float]:
        """kl `[B]`, from (kl) or (mu, log_var), and the part of its weight that depends on the shapes."""
        if log_var is not None:
            mu, kl = kl, ops.gaussian_kl(kl, log_var)
        if not self._by_shape:
            return kl, 1.0
        if log_var is None or recon.dim() != 4:
            raise ValueError(
                "kl_weight='m_over_n' needs mu and log_var, whose size is M, and recon [B, C, H, W], "
                f"whose H x W is N; got recon {list(recon.shape)} and kl {list(kl.shape)}: pass a number"
            )
        return kl, math.prod(mu.shape[1:]) / math.prod(recon.shape[2:])

    def _terms(
        self,
        recon: Tensor,
        target: Tensor,
        kl: Tensor,
        log_var: Tensor | None,
        step: Tensor | None = None,
        **schedule: Any,
    ) -> LossTerms:
        """The loss of a forward pass; `step` and `schedule` are the capacity's arguments."""
        kl, ratio = self._kl_and_ratio(recon, kl, log_var)
        tensors = recon, target, kl
        by_kernel = all(isinstance(t, Tensor) for t in tensors) and launch.runs_triton(*tensors)
        kl_scale = self._weight if by_kernel and self._weight.device == recon.device else None
        number = ratio if kl_scale is not None else ratio * self._number()
        objective = self._objective(kl_weight=number, **schedule)
        return ops.loss_of(objective, recon, target, kl, step=step, kl_scale=kl_scale)

    def extra_repr(self) -> str:
        return (
            f"kl_weight={self.kl_weight!r}, likelihood={self.likelihood!r}, activation={self.activation!r}, "
            f"reduction={self.reduction!r}, decoder_variance={self.decoder_variance}"
        )


class BetaLoss(_Loss):
    """loss = recon + beta * kl_weight * kld: Higgins et al. (2017); beta = 1 is the VAE.

    Args:
        beta: at least 0.
        kl_weight: 'm_over_n' is M / N, latent dimensions over pixels (H x W), to go with a mean squared
            error; a number is used unchanged: 1 with `reduction="sum"` is the paper's objective. It and beta
            may be assigned later, in every step too.
        likelihood, activation, reduction, decoder_variance: see `bvae.ops.vae_loss`.

    One launch forward and one backward. With (mu, log_var) there is one more of each, for the KL;
    `bvae.ops.reparam_kl` computes the KL with the sample at no extra cost.

    >>> import torch
    >>> from bvae import BetaLoss
    >>> objective = BetaLoss(beta=4.0, kl_weight=0.5)
    >>> recon, images = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    >>> objective(recon, images, torch.tensor([2.0])).loss  # 1 + 4 * 0.5 * 2
    tensor(5.)
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
        objective = Objective(
            likelihood=likelihood,
            activation=activation,
            reduction=reduction,
            decoder_variance=decoder_variance,
        )
        super().__init__(0.0, kl_weight, objective)
        self.beta = beta

    @property
    def beta(self) -> float:
        """The factor of the KL term, at least 0."""
        return self._factor

    @beta.setter
    def beta(self, value: float) -> None:
        if not _is_weight(value):
            raise ValueError(f"beta must be a finite number of at least 0, got {value!r}")
        self._set_factor(value)

    def forward(self, recon: Tensor, target: Tensor, kl: Tensor, log_var: Tensor | None = None) -> LossTerms:
        """`(recon, target, kl)` with kl `[B]`, or `(recon, target, mu, log_var)`: see `bvae.ops.vae_loss`."""
        return self._terms(recon, target, kl, log_var)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, {super().extra_repr()}"


class CapacityLoss(_Loss):
    """loss = recon + gamma * kl_weight * |kld - C|, C rising linearly to max_capacity: Burgess et al. (2018).

    The step counter `step`, 0-d int64, is part of the state_dict and counts the forward passes in training
    mode: the first has step 1. In eval mode it does not change, and C is that of the last training step.
    With activation checkpointing the recomputed pass counts too, as for BatchNorm's statistics: leave the
    loss out of the checkpointed part.

    Launches: those of `BetaLoss`, and one for the counter.

    Args:
        gamma: at least 0.
        max_capacity: C's last value in nats, reached at step `capacity_iters`.
        kl_weight: see `BetaLoss`.
        likelihood, activation, reduction, decoder_variance: see `bvae.ops.vae_loss`.

    >>> import torch
    >>> from bvae import CapacityLoss
    >>> objective = CapacityLoss(gamma=10.0, max_capacity=25.0, capacity_iters=25, kl_weight=1.0)
    >>> recon = images = torch.zeros(1, 3, 8, 8)
    >>> [objective(recon, images, torch.tensor([2.0])).loss.item() for step in range(3)]  # C is 1, 2, 3 nats
    [10.0, 0.0, 10.0]
    >>> objective.step
    tensor(3)
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
        objective = Objective(
            max_capacity=max_capacity,
            capacity_iters=capacity_iters,
            likelihood=likelihood,
            activation=activation,
            reduction=reduction,
            decoder_variance=decoder_variance,
        )
        super().__init__(0.0, kl_weight, objective)
        self.gamma = gamma
        self.max_capacity = max_capacity
        self.capacity_iters = capacity_iters
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def gamma(self) -> float:
        """The factor of |kld - C|, at least 0."""
        return self._factor

    @gamma.setter
    def gamma(self, value: float) -> None:
        if not _is_weight(value):
            raise ValueError(f"gamma must be a finite number of at least 0, got {value!r}")
        self._set_factor(value)

    def forward(self, recon: Tensor, target: Tensor, kl: Tensor, log_var: Tensor | None = None) -> LossTerms:
        """`(recon, target, kl)` with kl `[B]`, or `(recon, target, mu, log_var)`: see `bvae.ops.vae_loss`."""
        if self.training:
            self.step.add_(1)
        schedule = {"max_capacity": self.max_capacity, "capacity_iters": self.capacity_iters}
        return self._terms(recon, target, kl, log_var, step=self.step, **schedule)

    def extra_repr(self) -> str:
        schedule = (
            f"gamma={self.gamma}, max_capacity={self.max_capacity}, capacity_iters={self.capacity_iters}"
        )
        return f"{schedule}, {super().extra_repr()}"
