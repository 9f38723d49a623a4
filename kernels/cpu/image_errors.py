"""Logits and target -> the binary cross-entropy of each image, with a gradient in closed form.

    errors[b] = sum of (1 - y) x - log sigmoid(x)          d errors[b] / d x = sigmoid(x) - y

`reference.pixel_errors` is the specification. Here the backward pass works in place, on what `forward` has made.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bvae.kernels.cpu import library


def bernoulli_errors(logits: Tensor, target: Tensor) -> Tensor:
    """The errors `[B]` in nats, float32.

    Args:
        logits: `[B, ...]`, floating point.
        target: of the same shape: floating point in [0, 1], or uint8, which is scaled to it.
    """
    return _BernoulliErrors.apply(logits, target)


class _BernoulliErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        x, y = logits.float(), target.float()
        if target.dtype == torch.uint8:
            y.mul_(1 / 255)
        ctx.save_for_backward(logits, x, y)
        errors = (1.0 - y).mul_(x).sub_(F.logsigmoid(x))
        return errors.sum(tuple(range(1, errors.dim())))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, x, y = ctx.saved_tensors
        grad = grad.view(-1, *[1] * (logits.dim() - 1))
        if library.is_graph_wanted():
            return (grad * (torch.sigmoid(logits.float()) - y)).to(logits.dtype), None
        return torch.sigmoid(x).sub_(y).mul_(grad).to(logits.dtype), None
