"""BatchNorm of a training batch and the LeakyReLU after it, in C++: two passes forward, two backward.

    y     = leaky_relu((x - mean) * scale + bias),  scale = weight / sqrt(var + eps)
    g     = dy where (x - mean) * scale + bias > 0, dy * slope elsewhere
    dbias = sum g,  dweight = sum g * (x - mean) / sqrt(var + eps)
    dx    = scale * (g - dbias / M - (x - mean) * dweight / (M * sqrt(var + eps)))

M is the number of pixels in the batch, mean and var are a channel's over them (Ioffe & Szegedy 2015). The
backward pass computes the sign again from x, so that neither y nor a mask is stored.
"""

from ctypes import c_double, c_float, c_int, c_int64
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bvae.kernels.cpu import library
from bvae.kernels.cpu.library import pointer, rows

DTYPES = (torch.float32, torch.bfloat16)  # of x and y; bfloat16 under autocast, whose weights are float32


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `batch_norm_leaky_relu` computes this; one pixel has no variance, which PyTorch refuses."""
    dtypes = x.dtype in DTYPES and weight.dtype == torch.float32
    return dtypes and x.numel() > x.shape[1] and library.takes(x)


def batch_norm_leaky_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [N, C, H, W], and the batch's mean and unbiased variance [C] for the running statistics."""
    return _BatchNormLeakyReLU.apply(x, weight, bias, eps, slope)


class _BatchNormLeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, factors, mean, variance = forward(x, weight, bias, eps, slope)
        ctx.save_for_backward(x, weight, bias, factors, mean)
        ctx.eps, ctx.slope = eps, slope
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, factors, mean = ctx.saved_tensors
        if library.is_graph_wanted():
            y = F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps), ctx.slope)
            inputs = [t for t, wanted in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if wanted]
            gradients = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return *(next(gradients) if wanted else None for wanted in ctx.needs_input_grad[:3]), None, None
        return *backward(grad, x, factors, mean, ctx.slope), None, None


@torch.library.custom_op("bvae::cpu_batch_norm_leaky_relu", mutates_args=())
def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, factors [4, C] for the backward pass (see layers.cpp), the mean and the unbiased variance [C]."""
    assert library.loaded
    data, factor, offset = rows(x), weight.contiguous(), bias.contiguous()
    channels = x.shape[1]
    y, factors = torch.empty_like(data), weight.new_empty(4, channels)
    mean, variance = weight.new_empty(channels), weight.new_empty(channels)
    library.loaded.bvae_batch_norm(
        *(pointer(tensor) for tensor in (data, factor, offset, y, factors, mean, variance)),
        *(c_int64(x.numel() // channels), c_int64(channels)),
        *(c_double(eps), c_float(slope), c_int(x.dtype == torch.bfloat16), c_int(torch.get_num_threads())),
    )
    return y.permute(0, 3, 1, 2), factors, mean, variance


@forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, channels = torch.empty_like(rows(x)).permute(0, 3, 1, 2), x.shape[1]
    return y, weight.new_empty(4, channels), weight.new_empty(channels), weight.new_empty(channels)


@torch.library.custom_op("bvae::cpu_batch_norm_leaky_relu_backward", mutates_args=())
def backward(
    grad: Tensor, x: Tensor, factors: Tensor, mean: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    assert library.loaded
    gradient, data = rows(grad), rows(x)
    channels = x.shape[1]
    grad_x, grad_weight, grad_bias = (
        torch.empty_like(data),
        mean.new_empty(channels),
        mean.new_empty(channels),
    )
    library.loaded.bvae_batch_norm_backward(
        *(pointer(tensor) for tensor in (gradient, data, factors, mean, grad_x, grad_weight, grad_bias)),
        *(c_int64(x.numel() // channels), c_int64(channels)),
        *(c_float(slope), c_int(x.dtype == torch.bfloat16), c_int(torch.get_num_threads())),
    )
    return grad_x.permute(0, 3, 1, 2), grad_weight, grad_bias


@backward.register_fake
def _(grad: Tensor, x: Tensor, factors: Tensor, mean: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    return torch.empty_like(rows(x)).permute(0, 3, 1, 2), mean.new_empty(channels), mean.new_empty(channels)
