"""Operations on the network's layers: BatchNorm with LeakyReLU, and the last block with its errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bvae import arguments, reference
from bvae.kernels import launch
from bvae.objective import Objective

if launch.AVAILABLE:
    import bvae.kernels.batch_norm
    import bvae.kernels.last_block


def batch_norm_leaky_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
) -> Tensor:
    """BatchNorm of a training batch and the LeakyReLU after it: `F.leaky_relu(F.batch_norm(...))`.

        y = leaky_relu((x - mean) / sqrt(var + eps) * weight + bias)      Ioffe and Szegedy (2015)

    The kernels take x in channels_last, in two launches forward and two backward, and one each for at most
    2304 pixels. They keep x for the backward pass, and not y. Other layouts run the reference.

    Args:
        x: `[N, C, H, W]`, floating point, with more than one pixel per channel in the batch.
        weight, bias: `[C]`, floating point.
        running_mean, running_var: `[C]`, or None. They are moved by `momentum` towards the batch's mean and
            unbiased variance, in place.

    Returns:
        y, like x. Equal inputs give equal bits.

    Raises:
        TypeError, ValueError: naming the argument, its shape and what was expected.

    >>> import torch
    >>> from bvae.ops import batch_norm_leaky_relu
    >>> x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    >>> batch_norm_leaky_relu(x, torch.ones(1), torch.zeros(1), negative_slope=0.5).flatten()
    tensor([-0.5000,  1.0000])
    """
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    arguments.check_batch_norm(x, {name: vector for name, vector in named.items() if vector is not None})
    if launch.runs_triton(x, weight, bias) and bvae.kernels.batch_norm.takes(x):
        y, mean, _rstd, var = bvae.kernels.batch_norm.batch_norm_leaky_relu(
            x, weight.contiguous(), bias.contiguous(), eps, negative_slope
        )
    else:
        y, mean, var = reference.batch_norm_leaky_relu(x, weight, bias, eps, negative_slope)
    move_running(running_mean, running_var, mean, var, momentum)
    return y


def has_batch_norm_kernel(x: Tensor) -> bool:
    """Whether `batch_norm_leaky_relu` runs a kernel for x: where kernels run, in a layout that they take."""
    return launch.runs_triton(x) and bvae.kernels.batch_norm.takes(x)


_moves: dict[float, tuple[list[Tensor], list[Tensor]]] | None = None  # by momentum; None: each moves at once


@contextmanager
def running_statistics_together() -> Iterator[None]:
    """Move the running statistics of all layers that run in this context at its end, by one launch.

    Each layer may run once.
    """
    global _moves
    _moves = {}
    try:
        yield
        with torch.no_grad():
            for momentum, (running, batch) in _moves.items():
                torch._foreach_lerp_(running, batch, momentum)
    finally:
        _moves = None


@torch.no_grad()
def move_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, momentum: float
) -> None:
    """Move running statistics `[C]`, where there are any, by `momentum` towards those of a batch."""
    pairs = [(a, b.to(a.dtype)) for a, b in ((running_mean, mean), (running_var, var)) if a is not None]
    if _moves is not None:
        running, batch = _moves.setdefault(momentum, ([], []))
        running += [a for a, _ in pairs]
        batch += [b for _, b in pairs]
    elif pairs:
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], momentum)


def last_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    objective: Objective,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """BatchNorm, LeakyReLU, a 3 x 3 convolution to pixels and the reconstruction's error of each image.

        a      = batch_norm_leaky_relu(x, norm_weight, norm_bias)
        recon  = conv2d(a, weight, bias, padding=1)
        errors = the summed error of each image, which `bvae.reference.terms_of` makes a loss of

    The kernels store neither a nor recon: x is read twice forward and twice backward, and its gradient is
    written once. They take bfloat16 and float16 in channels_last of up to 64 channels and 128 columns, with 1
    or 3 output channels; everything else runs the reference.

    Args:
        x: `[B, C, H, W]`, floating point, with more than one pixel per channel in the batch.
        norm_weight, norm_bias, running_mean, running_var, momentum, eps, negative_slope: as in
            `batch_norm_leaky_relu`.
        weight, bias: `[channels, C, 3, 3]` and `[channels]`; used in x's dtype.
        target: `[B, channels, H, W]` or `[B, H, W, channels]`, as in `vae_loss`. It gets no gradient.
        objective: its likelihood, activation and, for logistic, scale; a variance or scale of several numbers
            is refused.

    Returns:
        errors `[B]`, float32, to be divided by the variance or scale; and the squared errors of the activated
        outputs `[B]`, without a gradient.

    Raises:
        TypeError, ValueError: naming the argument, its shape and what was expected.

    >>> import torch
    >>> from bvae.objective import Objective
    >>> from bvae.ops import last_block
    >>> x, one, zero = torch.zeros(2, 1, 4, 4), torch.ones(1), torch.zeros(1)
    >>> weight, target = torch.ones(1, 1, 3, 3), torch.ones(2, 1, 4, 4)
    >>> last_block(x, one, zero, weight, zero, target, Objective())[0]
    tensor([16., 16.])
    """
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    running = {"running_mean": running_mean, "running_var": running_var}
    given = {**vectors, **{name: each for name, each in running.items() if each is not None}}
    arguments.check_batch_norm(x, given)
    target = arguments.check_last_block(x, weight, bias, target, objective)
    tensors = x, norm_weight, norm_bias, weight, bias, target
    if launch.runs_triton(*tensors) and has_last_block_kernel(x, weight, objective):
        likelihood = objective.likelihood if objective.from_logits else "probabilities"
        errors, squares, _grad, _sums, mean, _rstd, var = bvae.kernels.last_block.last_block(
            x,
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            weight,
            bias.contiguous(),
            target,
            torch.is_grad_enabled() and any(t.requires_grad for t in tensors[:5]),
            eps,
            negative_slope,
            likelihood,
            objective.activation,
            objective.spread if objective.likelihood == "logistic" else 1.0,
            objective.pixel_range[0],
        )
    else:
        errors, squares, mean, var = reference.last_block(
            *tensors[:5], target.detach(), objective, eps, negative_slope
        )
    move_running(running_mean, running_var, mean, var, momentum)
    return errors, squares


def has_last_block_kernel(x: Tensor, weight: Tensor, objective: Objective) -> bool:
    """Whether `last_block` runs a kernel: where kernels run, for sizes and a likelihood that they take."""
    return (
        launch.runs_triton(x, weight)
        and bvae.kernels.last_block.takes(x, weight)
        and objective.has_kernel(x.dtype)
    )
