"""Logits and target -> the binary cross-entropy of each image, with a gradient in closed form.

    errors[b] = sum of (1 - y) x - log sigmoid(x)          d errors[b] / d x = sigmoid(x) - y

`reference.pixel_errors` is the specification. PyTorch's function takes `log1p`, which has no AVX-512 form and
then costs ten times as much as all that is here.
"""

from typing import Any

import torch
from torch import Tensor


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
            y = y * (1 / 255)
        ctx.save_for_backward(logits, y)
        log_sigmoid = x.clamp(max=0.0).sub_(_log1p(x.abs().neg_().exp_()))
        errors = (1.0 - y).mul_(x).sub_(log_sigmoid)
        return errors.sum(tuple(range(1, errors.dim())))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, y = ctx.saved_tensors
        grad = grad.view(-1, *[1] * (logits.dim() - 1))
        return (grad * (torch.sigmoid(logits.float()) - y)).to(logits.dtype), None


def _log1p(x: Tensor) -> Tensor:
    """log(1 + x) for x in [0, 1], which is overwritten: what the rounding of 1 + x lost is added again."""
    u = x + 1.0
    lost = x.sub_(u - 1.0).div_(u)
    return u.log_().add_(lost)
