"""The options of an objective, checked, and the terms that it gives."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Likelihood = Literal["gaussian", "laplace", "logistic", "bernoulli"]
Activation = Literal["tanh", "sigmoid"] | None
Reduction = Literal["mean", "sum", "none"]
Variance = float | Tensor | Literal["optimal"]
Weights = Literal["stratified", "weighted"]  # of the posteriors of a batch, for the total correlation


class LossTerms(NamedTuple):
    """The objective and its parts, float32 (float64 if an argument is float64).

    0-d tensors; with `reduction="none"`, loss, recon and kld are `[B]`.
    """

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
    max_capacity: float | Tensor = 25.0  # nats
    capacity_iters: int = 10_000  # steps
    likelihood: Likelihood = "gaussian"
    activation: Activation = None
    reduction: Reduction = "mean"
    decoder_variance: Variance = 0.5
    decoder_scale: float | Tensor = 1.0
    from_logits: bool = True

    def __post_init__(self) -> None:
        _check_name("likelihood", self.likelihood, ("gaussian", "laplace", "logistic", "bernoulli"))
        if self.activation not in (None, "tanh", "sigmoid"):
            raise ValueError(f"activation must be None, 'tanh' or 'sigmoid', got {self.activation!r}")
        _check_name("reduction", self.reduction, ("mean", "sum", "none"))
        if self.likelihood == "bernoulli" and self.activation is not None:
            raise ValueError(
                "a bernoulli likelihood takes logits, or probabilities with from_logits=False: activation "
                f"must be None, got {self.activation!r}"
            )
        if not self.from_logits and self.likelihood != "bernoulli":
            raise ValueError(f"from_logits=False needs likelihood='bernoulli', got {self.likelihood!r}")
        if isinstance(self.capacity_iters, Tensor):  # whose gradient would be lost without a word
            raise TypeError("capacity_iters must be a number, got a tensor: give int(capacity_iters)")
        if not 1 <= self.capacity_iters < math.inf or self.capacity_iters % 1 != 0:
            raise ValueError(f"capacity_iters must be at least 1 step and whole, got {self.capacity_iters}")
        if isinstance(self.kl_weight, bool) or not isinstance(self.kl_weight, (int, float)):
            got = type(self.kl_weight).__name__
            raise TypeError(f"kl_weight must be a number or a 0-d tensor, got {got}")
        if not isinstance(self.max_capacity, Tensor) and not 0 <= self.max_capacity < math.inf:
            raise ValueError(f"max_capacity must be at least 0 nats, got {self.max_capacity}")
        self._check_spread()

    def _check_spread(self) -> None:
        variance, scale = self.decoder_variance, self.decoder_scale
        if isinstance(variance, str):
            if variance != "optimal":
                raise ValueError(
                    f"decoder_variance must be a number, a tensor or 'optimal', got {variance!r}"
                )
        elif not isinstance(variance, Tensor) and not 0 < variance < math.inf:
            raise ValueError(f"decoder_variance must be positive, got {variance}")
        if not isinstance(scale, Tensor) and not 0 < scale < math.inf:
            raise ValueError(f"decoder_scale must be positive, got {scale}")
        if self.likelihood != "gaussian" and isinstance(variance, (str, Tensor)):
            raise ValueError(f"decoder_variance belongs to a gaussian likelihood, got {self.likelihood!r}")
        if self.likelihood not in ("laplace", "logistic") and (isinstance(scale, Tensor) or scale != 1.0):
            raise ValueError(
                f"decoder_scale belongs to a laplace or logistic likelihood, got {self.likelihood!r}"
            )

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The range of the decoder's output, to which uint8 pixels are scaled.

        [0, 1] for a Bernoulli likelihood or a sigmoid. Otherwise [-1, 1], for a tanh and for outputs that are
        already activated.
        """
        return (0.0 if self.likelihood == "bernoulli" or self.activation == "sigmoid" else -1.0), 1.0

    @property
    def spread(self) -> Variance:
        """What the likelihood divides the error by: the Gaussian's variance, or the scale (1: Bernoulli)."""
        return self.decoder_variance if self.likelihood == "gaussian" else self.decoder_scale

    def has_kernel(self, dtype: torch.dtype) -> bool:
        """Whether the kernels compute the reconstruction term for a decoder's output of this dtype."""
        if isinstance(self.spread, Tensor) and (self.likelihood == "logistic" or self.spread.numel() > 1):
            return False
        # the gradient at a probability near 0 is beyond float16, and the kernels store it
        return self.from_logits or dtype != torch.float16


def _check_name(option: str, value: object, names: tuple[str, ...]) -> None:
    if value not in names:
        choices = " or ".join((", ".join(map(repr, names[:-1])), repr(names[-1])))
        raise ValueError(f"{option} must be {choices}, got {value!r}")
