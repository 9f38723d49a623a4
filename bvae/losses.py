"""The beta-VAE's objectives as modules, also for use in other VAE code."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bvae import ops, reference
from bvae.kernels import launch
from bvae.objective import Activation, Likelihood, LossTerms, Objective, Reduction, Variance

__all__ = ["AnnealedBeta", "BetaLoss", "CapacityLoss", "LossTerms"]

KLWeight = float | Tensor | Literal["m_over_n"]


def _is_weight(value: object) -> bool:
    """Whether `value` is a finite number of at least 0, or one floating-point number in a tensor."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and tuple(value.shape) in ((), (1,))
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


class _Loss(nn.Module):
    """The common part of the objectives: the reconstruction term's options and the weight of the KL.

    The weight is beta or gamma times kl_weight. These attributes may be assigned at any time, in every step
    too, and between calls of a compiled function or replays of a captured graph. An assignment that changes
    the product writes it to a 0-d tensor (one launch, no sync), which the kernels read. A step without such
    an assignment launches nothing. On the reference path, or if the module is not on the device of its
    arguments, the weight is the Python number, which a captured graph freezes.

    Either may be a tensor: a Parameter is learned, and any other tensor becomes a buffer.
    """

    _factor_name: str  # "beta" or "gamma"
    _weight: Tensor  # the product of the numbers; 'm_over_n' counts as 1, and multiplies in forward
    kl_weight: KLWeight
    _by_shape: bool
    _has_tensor: bool

    def __init__(self, factor: float | Tensor, kl_weight: KLWeight, objective: Objective) -> None:
        super().__init__()
        self.register_buffer("_weight", torch.zeros((), dtype=torch.float32), persistent=False)
        setattr(self, self._factor_name, factor)
        self.kl_weight = kl_weight
        self.likelihood: Likelihood = objective.likelihood
        self.activation: Activation = objective.activation
        self.reduction: Reduction = objective.reduction
        self.decoder_variance: Any = objective.decoder_variance  # a number, for the trainer
        self.decoder_scale = objective.decoder_scale
        self.from_logits = objective.from_logits

    def objective(self, **options: Any) -> Objective:
        """The options as they are now, checked: each is an attribute that may be assigned."""
        return Objective(
            likelihood=self.likelihood,
            activation=self.activation,
            reduction=self.reduction,
            decoder_variance=self.decoder_variance,
            decoder_scale=self.decoder_scale,
            from_logits=self.from_logits,
            **options,
        )

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The range to which uint8 targets are scaled: that of the decoder's output."""
        return self.objective().pixel_range

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (self._factor_name, "kl_weight"):
            self._set_weight(name, value)
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and name not in self._buffers:
            self.register_buffer(name, value, persistent=False)  # moves with the module
        else:
            super().__setattr__(name, value)

    def _set_weight(self, name: str, value: Any) -> None:
        by_shape = name == "kl_weight" and isinstance(value, str) and value == "m_over_n"
        if not by_shape and not _is_weight(value):
            expected = "'m_over_n' or " if name == "kl_weight" else ""
            raise ValueError(f"{name} must be {expected}a finite number of at least 0, got {value!r}")
        before = self.__dict__.get(name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and name not in self._buffers:
            self.__dict__.pop(name, None)
            self.register_buffer(name, value, persistent=False)
        else:
            super().__setattr__(name, value)
        # in attributes of their own, so that a compiled forward pass does not depend on the numbers
        if name == "kl_weight":
            self.__dict__["_by_shape"] = by_shape
        self.__dict__["_has_tensor"] = any(isinstance(part, Tensor) for part in self._parts())
        if not isinstance(value, Tensor) and value != before:
            self._write_weight()

    def _parts(self) -> tuple[Any, Any]:
        return getattr(self, self._factor_name, 1.0), getattr(self, "kl_weight", 1.0)  # 1: not assigned yet

    def _number(self) -> float:
        """The product of the two numbers, where 'm_over_n' counts as 1."""
        product = 1.0
        for part in self._parts():
            if not isinstance(part, (str, Tensor)):
                product *= float(part)
        return product

    def _tensor(self) -> Tensor:
        """The product of the two where one is a tensor."""
        product = self._weight.new_ones(())
        for part in self._parts():
            if not isinstance(part, str):
                product = product * (part.reshape(()) if isinstance(part, Tensor) else float(part))
        return product

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

    def forward(
        self,
        recon: Tensor,
        target: Tensor,
        kl: Tensor,
        log_var: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LossTerms:
        """`(recon, target, kl)` with kl `[B]`, or `(recon, target, mu, log_var)`: see `bvae.ops.vae_loss`."""
        schedule = self._schedule()
        kl, number = self._kl_and_ratio(recon, kl, log_var)
        tensors = recon, target, kl
        by_kernel = all(isinstance(t, Tensor) for t in tensors) and launch.runs_triton(*tensors)
        objective, rest = self._now(number, by_kernel and self._weight.device == recon.device, **schedule)
        return ops.loss_of(objective, recon, target, kl, weight=weight, mask=mask, **rest)

    def of_errors(self, errors: Tensor, elements: int, kl: Tensor) -> LossTerms:
        """The loss where `bvae.ops.last_block` has computed the errors.

        Args:
            errors: `[B]`, each the sum of an image's `elements` errors.
            kl: `[B]`, nats; kl_weight must be a number.
        """
        schedule = self._schedule()
        kl, number = self._kl_and_ratio(errors, kl, None)
        objective, rest = self._now(number, self._weight.device == errors.device, **schedule)
        return reference.terms_of(errors, elements, kl, objective, **rest)

    def _schedule(self) -> dict[str, Any]:
        """What follows the training step, whose counter advances: the arguments of `_now`."""
        return {}

    def _now(
        self,
        number: float,
        on_device: bool,
        *,
        ramp: Tensor | None = None,
        step: Tensor | None = None,
        **capacity: Any,
    ) -> tuple[Objective, dict[str, Any]]:
        """The objective of a forward pass, and the arguments of `bvae.ops.loss_of` that are on the device.

        Args:
            number: a factor of the KL's weight, as is `ramp`.
            on_device: read the weight from the device, so that a captured graph follows it.
        """
        kl_scale = None
        if self._has_tensor:
            kl_scale = self._tensor()
        elif on_device:
            kl_scale = self._weight
        else:
            number = number * self._number()
        if ramp is not None:
            kl_scale = ramp if kl_scale is None else ramp * kl_scale
        return self.objective(kl_weight=number, **capacity), {"step": step, "kl_scale": kl_scale}

    def extra_repr(self) -> str:
        return (
            f"kl_weight={self.kl_weight!r}, likelihood={self.likelihood!r}, activation={self.activation!r}, "
            f"reduction={self.reduction!r}, decoder_variance={self.decoder_variance}"
        )


class _StepCounter(nn.Module):
    """Counts the forward passes in training mode in `step`, 0-d int64, a part of the state_dict.

    The first pass has step 1. In eval mode the counter does not change. A state_dict without it, such as that
    of a model before its loss had a counter, loads and leaves it as it is. With activation checkpointing the
    recomputed pass counts too, as for BatchNorm's statistics: leave the loss out of the checkpointed part.
    """

    step: Tensor

    def _start_counter(self) -> None:
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def _count(self) -> Tensor:
        if self.training:
            self.step.add_(1)
        return self.step

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "step", self.step)
        super()._load_from_state_dict(state_dict, prefix, *args)


class BetaLoss(_Loss):
    """loss = recon + beta * kl_weight * kld: Higgins et al. (2017); beta = 1 is the VAE.

    Args:
        beta: at least 0. A number, or one in a tensor; a Parameter is learned.
        kl_weight: 'm_over_n' is M / N, latent dimensions over pixels (H x W), to go with a mean squared
            error; a number is used unchanged: 1 with `reduction="sum"` is the paper's objective. It and beta
            may be assigned later, in every step too.
        likelihood, activation, from_logits, reduction, decoder_variance, decoder_scale: see
            `bvae.ops.vae_loss`. A Parameter as variance or scale is one of the module's.

    One launch forward and one backward. With (mu, log_var) there is one more of each, for the KL;
    `bvae.ops.reparam_kl` computes the KL with the sample at no extra cost.

    >>> import torch
    >>> from bvae import BetaLoss
    >>> objective = BetaLoss(beta=4.0, kl_weight=0.5)
    >>> recon, images = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    >>> objective(recon, images, torch.tensor([2.0])).loss  # 1 + 4 * 0.5 * 2
    tensor(5.)
    """

    _factor_name = "beta"
    beta: float | Tensor

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        kl_weight: KLWeight = "m_over_n",
        *,
        likelihood: Likelihood = "gaussian",
        activation: Activation = None,
        from_logits: bool = True,
        reduction: Reduction = "mean",
        decoder_variance: Variance = 0.5,
        decoder_scale: float | Tensor = 1.0,
    ) -> None:
        objective = Objective(
            likelihood=likelihood,
            activation=activation,
            reduction=reduction,
            decoder_variance=decoder_variance,
            decoder_scale=decoder_scale,
            from_logits=from_logits,
        )
        super().__init__(beta, kl_weight, objective)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, {super().extra_repr()}"


class AnnealedBeta(_StepCounter, BetaLoss):
    """`BetaLoss` with a linear warm-up: loss = recon + beta * min(step / warmup_steps, 1) * kl_weight * kld.

    The warm-up of Bowman et al. (2016) and Soenderby et al. (2016). The counter `step` is in the state_dict
    and counts the forward passes in training mode; the first has step 1. The factor is computed on the device
    (three small launches, no sync), so a compiled function or a captured graph follows it.

    Args:
        beta: the factor after the warm-up.
        warmup_steps: at least 1.
        kl_weight and the other options: see `BetaLoss`.

    >>> import torch
    >>> from bvae import AnnealedBeta
    >>> objective = AnnealedBeta(beta=4.0, warmup_steps=2, kl_weight=1.0)
    >>> recon = images = torch.zeros(1, 3, 8, 8)
    >>> [objective(recon, images, torch.tensor([1.0])).loss.item() for step in range(3)]
    [2.0, 4.0, 4.0]
    """

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        warmup_steps: int = 10_000,
        kl_weight: KLWeight = "m_over_n",
        **options: Any,
    ) -> None:
        super().__init__(beta, kl_weight, **options)
        whole = isinstance(warmup_steps, Real) and warmup_steps % 1 == 0
        if not whole or isinstance(warmup_steps, bool) or warmup_steps < 1:
            raise ValueError(f"warmup_steps must be at least 1 step and whole, got {warmup_steps!r}")
        self.warmup_steps = warmup_steps
        self._start_counter()

    def _schedule(self) -> dict[str, Any]:
        return {"ramp": (self._count().float() / self.warmup_steps).clamp(max=1.0)}

    def extra_repr(self) -> str:
        return f"warmup_steps={self.warmup_steps}, {super().extra_repr()}"


class CapacityLoss(_StepCounter, _Loss):
    """loss = recon + gamma * kl_weight * |kld - C|, C rising linearly to max_capacity: Burgess et al. (2018).

    The counter `step` is in the state_dict and counts the forward passes in training mode; the first has step
    1. In eval mode C is that of the last training step.

    Launches: those of `BetaLoss`, and one for the counter.

    Args:
        gamma: at least 0. A number, or one in a tensor; a Parameter is learned.
        max_capacity: C's last value in nats, reached at step `capacity_iters`; as gamma.
        kl_weight: see `BetaLoss`.
        likelihood, activation, from_logits, reduction, decoder_variance, decoder_scale: see
            `bvae.ops.vae_loss`. A Parameter as variance or scale is one of the module's.

    >>> import torch
    >>> from bvae import CapacityLoss
    >>> objective = CapacityLoss(gamma=10.0, max_capacity=25.0, capacity_iters=25, kl_weight=1.0)
    >>> recon = images = torch.zeros(1, 3, 8, 8)
    >>> [objective(recon, images, torch.tensor([2.0])).loss.item() for step in range(3)]  # C is 1, 2, 3 nats
    [10.0, 0.0, 10.0]
    >>> objective.step
    tensor(3)
    """

    _factor_name = "gamma"
    gamma: float | Tensor

    def __init__(
        self,
        gamma: float | Tensor = 10.0,
        max_capacity: float | Tensor = 25.0,
        capacity_iters: int = 10_000,
        kl_weight: KLWeight = "m_over_n",
        *,
        likelihood: Likelihood = "gaussian",
        activation: Activation = None,
        from_logits: bool = True,
        reduction: Reduction = "mean",
        decoder_variance: Variance = 0.5,
        decoder_scale: float | Tensor = 1.0,
    ) -> None:
        objective = Objective(
            max_capacity=max_capacity,
            capacity_iters=capacity_iters,
            likelihood=likelihood,
            activation=activation,
            reduction=reduction,
            decoder_variance=decoder_variance,
            decoder_scale=decoder_scale,
            from_logits=from_logits,
        )
        super().__init__(gamma, kl_weight, objective)
        self.max_capacity = max_capacity
        self.capacity_iters = capacity_iters
        self._start_counter()

    def _schedule(self) -> dict[str, Any]:
        capacity = {"max_capacity": self.max_capacity, "capacity_iters": self.capacity_iters}
        return {"step": self._count(), **capacity}

    def extra_repr(self) -> str:
        schedule = (
            f"gamma={self.gamma}, max_capacity={self.max_capacity}, capacity_iters={self.capacity_iters}"
        )
        return f"{schedule}, {super().extra_repr()}"
