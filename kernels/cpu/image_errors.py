"""recon and target -> the error of each image, with a gradient in closed form, for two likelihoods.

    gaussian     errors[b] = sum of (v - y)^2, v = activation(x)         d errors[b] / d x = 2 (v - y) v'
    bernoulli    errors[b] = sum of (1 - y) x - log sigmoid(x)           d errors[b] / d x = sigmoid(x) - y

`reference.pixel_errors` is the specification. Here fewer tensors are made, and most of the work is in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bvae.kernels.cpu import library


def image_errors(
    recon: Tensor, target: Tensor, likelihood: str, activation: str | None, pixel_low: float
) -> Tensor:
    """The errors `[B]`, float32.

    Args:
        recon: `[B, ...]`, floating point: before the activation, or logits.
        target: of the same shape: floating point, or uint8, which is scaled to [pixel_low, 1].
        likelihood: gaussian or bernoulli.
        activation: of the gaussian: tanh, sigmoid or None.
        pixel_low: -1 or 0.
    """
    if likelihood == "bernoulli":
        return _Bernoulli.apply(recon, target)
    return _Gaussian.apply(recon, target, activation, pixel_low)


class _Gaussian(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recon: Tensor, target: Tensor, activation: str | None, pixel_low: float) -> Tensor:
        value = _activate(recon.float(), activation)
        difference = value - _scaled(target, pixel_low)
        ctx.save_for_backward(recon, target, value, difference)
        ctx.activation, ctx.pixel_low = activation, pixel_low
        return torch.linalg.vector_norm(difference, dim=_elements(recon)).square_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recon, target, value, difference = ctx.saved_tensors
        if library.is_graph_wanted():  # what was computed in `forward` has no graph
            value = _activate(recon.float(), ctx.activation)
            difference = value - _scaled(target, ctx.pixel_low)
        by_value = difference * (2 * _per_image(grad, recon))
        if ctx.activation == "tanh":
            by_value = torch.ops.aten.tanh_backward(by_value, value)
        elif ctx.activation == "sigmoid":
            by_value = torch.ops.aten.sigmoid_backward(by_value, value)
        return by_value.to(recon.dtype), None, None, None


class _Bernoulli(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        x, y = logits.float(), _scaled(target, 0.0)
        if target.is_floating_point():  # as the reference: what is no probability shows in the loss
            y = torch.where((y < 0) | (y > 1), torch.nan, y)
        ctx.save_for_backward(logits, x, y)
        return (1.0 - y).mul_(x).sub_(F.logsigmoid(x)).sum(_elements(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, x, y = ctx.saved_tensors
        grad = _per_image(grad, logits)
        if library.is_graph_wanted():
            return (grad * (torch.sigmoid(logits.float()) - y)).to(logits.dtype), None
        return torch.sigmoid(x).sub_(y).mul_(grad).to(logits.dtype), None


def _activate(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else torch.tanh(x) if activation == "tanh" else torch.sigmoid(x)


def _scaled(target: Tensor, pixel_low: float) -> Tensor:
    """A target in the decoder's range: the arithmetic of `reference.scale_pixels`."""
    if target.dtype != torch.uint8:
        return target.float()
    if pixel_low == 0.0:
        return target.float().mul_(1 / 255)
    return target.float().sub_(127.5).mul_(1 / 127.5)


def _elements(x: Tensor) -> tuple[int, ...]:
    """The dimensions of an image's elements."""
    return tuple(range(1, x.dim()))


def _per_image(grad: Tensor, x: Tensor) -> Tensor:
    return grad.view(-1, *[1] * (x.dim() - 1))
