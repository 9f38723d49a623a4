"""Convolutions whose gradients, or which themselves, oneDNN computes far below the machine's peak.

    to few channels   3 x 3, stride 1, to 1 or 3 channels: forward and the weight's gradient in C++
    deep              3 x 3, stride 2, small images of many channels: the weight's gradient as one product of
                      matrices, small^T @ columns. A row of columns has the 3 x 3 pixels of `big` that a pixel
                      of `small` is connected to. `big` is the larger image: the input of a convolution, the
                      output of a transposed one.

The input's gradient, and the forward pass of the deep ones, stay PyTorch's.
"""

from ctypes import c_int, c_int64
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bvae.kernels.cpu import library
from bvae.kernels.cpu.library import pointer, rows

FEW = (1, 3)  # channels for which there is C++
# A product of matrices beats oneDNN up to this many pixels of the smaller image (measured; 64 are even), and
# needs this many channels on both sides.
DEEP_PIXELS, DEEP_CHANNELS = 16, 32


def _takes(x: Tensor) -> bool:
    """Whether x is float32 and stays so; oneDNN's convolutions in bfloat16 are fast."""
    return x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and library.takes(x)


# --- To few channels --------------------------------------------------------------------------------------
def takes_few(x: Tensor, weight: Tensor) -> bool:
    """Whether `few` computes this 3 x 3 convolution of stride 1 and padding 1."""
    return weight.shape[0] in FEW and _takes(x)


def few(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution of x [N, C, H, W] with weight [1 or 3, C, 3, 3] and padding 1, plus bias [1 or 3]."""
    return _Few.apply(x, weight, bias)


class _Few(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolution(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        if library.is_graph_wanted():
            return _plain_backward(grad, x, weight, (1, False, 0), (for_x, for_weight, for_bias))
        return (
            _plain_backward(grad, x, weight, (1, False, 0), (True, False, False))[0] if for_x else None,
            weight_gradient(grad, x) if for_weight else None,
            grad.sum((0, 2, 3)) if for_bias else None,
        )


@torch.library.custom_op("bvae::cpu_convolution", mutates_args=())
def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`few` without gradients."""
    assert library.loaded
    data, packed, offset = rows(x), rows(weight), bias.contiguous()
    images, height, width, channels = map(c_int64, data.shape)
    out = weight.shape[0]
    y = x.new_empty(*data.shape[:3], out)
    library.loaded.bvae_convolution(
        *(pointer(data), pointer(packed), pointer(offset), pointer(y)),
        *(images, height, width, channels, c_int64(out), c_int(torch.get_num_threads())),
    )
    return y.permute(0, 3, 1, 2)


@convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], *x.shape[2:], weight.shape[0]).permute(0, 3, 1, 2)


@torch.library.custom_op("bvae::cpu_weight_gradient", mutates_args=())
def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `few`'s weight from that of its output, [N, 1 or 3, H, W], and its input."""
    assert library.loaded
    data, gradient = rows(x), rows(grad)
    images, height, width, channels = map(c_int64, data.shape)
    out = grad.shape[1]
    result = x.new_empty(out, 3, 3, x.shape[1])
    library.loaded.bvae_weight_gradient(
        *(pointer(gradient), pointer(data), pointer(result)),
        *(images, height, width, channels, c_int64(out), c_int(torch.get_num_threads())),
    )
    return result.permute(0, 3, 1, 2)


@weight_gradient.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(grad.shape[1], 3, 3, x.shape[1]).permute(0, 3, 1, 2)


# --- Deep -------------------------------------------------------------------------------------------------
def takes_deep(x: Tensor, weight: Tensor, transposed: bool) -> bool:
    """Whether `deep` computes this 3 x 3 convolution of stride 2 and padding 1 without a bias."""
    sides = x.shape[2:] if transposed else [(side + 1) // 2 for side in x.shape[2:]]
    few_pixels = sides[0] * sides[1] <= DEEP_PIXELS
    return few_pixels and min(weight.shape[:2]) >= DEEP_CHANNELS and _takes(x)


def deep(x: Tensor, weight: Tensor, transposed: bool, output_padding: int = 0) -> Tensor:
    """The convolution, or transposed convolution, of x [N, C, H, W] with a weight [., ., 3, 3], stride 2."""
    return _Deep.apply(x, weight, transposed, output_padding)


class _Deep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: bool, output_padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kind = 2, transposed, output_padding
        if transposed:
            return F.conv_transpose2d(x, weight, None, 2, 1, output_padding)
        return F.conv2d(x, weight, None, 2, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad[:2]
        if library.is_graph_wanted():
            return *_plain_backward(grad, x, weight, ctx.kind, (for_x, for_weight, False))[:2], None, None
        grad_x = _plain_backward(grad, x, weight, ctx.kind, (True, False, False))[0] if for_x else None
        small, big = (x, grad) if ctx.kind[1] else (grad, x)
        return grad_x, _product(small, big) if for_weight else None, None, None


def _product(small: Tensor, big: Tensor) -> Tensor:
    """The gradient [small's channels, big's channels, 3, 3] of a weight of stride 2."""
    n, channels, height, width = small.shape
    padded = F.pad(rows(big), (0, 0, 1, 1, 1, 1))
    image, row, pixel, _ = padded.stride()
    columns = padded.as_strided(
        (n, height, width, 3, 3, big.shape[1]), (image, 2 * row, 2 * pixel, row, pixel, 1)
    ).reshape(n * height * width, -1)
    product = rows(small).view(-1, channels).t() @ columns
    return product.view(channels, 3, 3, -1).permute(0, 3, 1, 2)


def _plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor, kind: tuple[int, bool, int], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """PyTorch's gradients of input, weight and bias; `kind` is the stride, transposed, and output padding."""
    stride, transposed, output_padding = kind
    return torch.ops.aten.convolution_backward(
        *(grad, x, weight, [weight.shape[0]]),
        *([stride, stride], [1, 1], [1, 1], transposed, [output_padding, output_padding], 1, wanted),
    )
