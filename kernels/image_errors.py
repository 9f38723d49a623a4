"""recon, target -> the summed error of each image, and the gradient of recon in the same pass.

    errors[b] = sum of error(recon[b], target[b])                    `likelihood` has the errors
    d errors[b] / d recon[b] = factor * unscaled_grad[b]

`capacity_loss` is this and the whole objective in one launch. This one is for objectives that weigh the
images, keep them apart, or divide the sums by a learned number: what follows is arithmetic on `[B]`.

The traffic is that of `capacity_loss`: 5 bytes per element for bfloat16 and uint8, 4 in the backward pass. A
program sums one block of one image; the sum over an image's blocks is torch's, in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvae.kernels import likelihood
from bvae.kernels.launch import Launch, check_single_backward, collapse, power_of_two
from bvae.kernels.likelihood import error_and_grad, pixel
from bvae.kernels.tile import offsets


@triton.jit
def _forward_kernel(
    recon,  # [batch, row_length] in 1 + DIMS dimensions, as target and unscaled_grad
    target,  # floating point, or uint8
    block_sums,  # [batch, blocks] float32
    unscaled_grad,  # in recon's dtype, or None
    row_length,
    pixel_shift,
    pixel_scale,
    low,
    half_bin,
    inverse_scale,
    log_width,
    sizes,
    recon_row_stride,
    recon_strides,
    target_row_stride,
    target_strides,
    unscaled_grad_row_stride,
    unscaled_grad_strides,
    DIMS: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(row_length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < row_length
    recon_ptrs = recon + row * recon_row_stride + offsets(column, sizes, recon_strides, DIMS)
    target_ptrs = target + row * target_row_stride + offsets(column, sizes, target_strides, DIMS)
    x = tl.load(recon_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = pixel(tl.load(target_ptrs, mask=mask, other=0), pixel_shift, pixel_scale, LIKELIHOOD)
    error, element_grad = error_and_grad(
        x, y, low, half_bin, inverse_scale, log_width, LIKELIHOOD, ACTIVATION
    )
    if unscaled_grad is not None:
        offset = row * unscaled_grad_row_stride + offsets(column, sizes, unscaled_grad_strides, DIMS)
        tl.store(unscaled_grad + offset, element_grad.to(unscaled_grad.dtype.element_ty), mask=mask)
    tl.store(block_sums + tl.program_id(0), tl.sum(tl.where(mask, error, 0.0), 0))


@triton.jit
def _backward_kernel(
    unscaled_grad,  # [batch, row_length] in 1 + DIMS dimensions, as grad_recon
    grad_errors,  # [batch]
    grad_recon,
    row_length,
    factor,
    grad_errors_stride,
    sizes,
    unscaled_grad_row_stride,
    unscaled_grad_strides,
    grad_recon_row_stride,
    grad_recon_strides,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(row_length, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < row_length
    offset = row * unscaled_grad_row_stride + offsets(column, sizes, unscaled_grad_strides, DIMS)
    g = tl.load(unscaled_grad + offset, mask=mask, other=0.0).to(tl.float32)
    g = g * (factor * tl.load(grad_errors + row * grad_errors_stride).to(tl.float32))
    grad_ptrs = grad_recon + row * grad_recon_row_stride + offsets(column, sizes, grad_recon_strides, DIMS)
    tl.store(grad_ptrs, g.to(grad_recon.dtype.element_ty), mask=mask)


_BLOCK, _WARPS = 2048, 8  # 8 elements per thread: 16 bytes of bfloat16, 8 of uint8


def _layout(**tensors: Tensor) -> tuple[dict[str, Any], int, int]:
    """The kernel arguments that describe the images, the number of programs, and the warps of each.

    The elements of an image are visited in the first tensor's order in memory: a sum allows any order.
    """
    first, *_ = tensors.values()
    order = sorted(range(1, first.dim()), key=first.stride, reverse=True)
    in_memory_order = [t.permute(0, *order) for t in tensors.values()]
    sizes, strides = collapse(tuple(in_memory_order[0].shape[1:]), *(t.stride()[1:] for t in in_memory_order))
    row_length = first[0].numel()
    block = min(max(power_of_two(row_length), 256), _BLOCK)
    args = {"row_length": row_length, "sizes": sizes, "DIMS": len(sizes), "BLOCK": block}
    for (name, tensor), inner in zip(tensors.items(), strides, strict=True):
        args[f"{name}_row_stride"], args[f"{name}_strides"] = tensor.stride(0), inner
    return args, first.shape[0] * triton.cdiv(row_length, block), block * _WARPS // _BLOCK


def plan_forward(
    recon: Tensor,
    target: Tensor,
    with_grad: bool,
    likelihood_name: str,
    activation: str | None,
    scale: float,
    pixel_low: float,
) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The forward launch, and the outputs it fills: block_sums `[B, blocks]` and unscaled_grad or nothing."""
    unscaled_grad = torch.empty_like(recon) if with_grad else recon.new_empty(0)
    layout, programs, warps = _layout(
        recon=recon, target=target, unscaled_grad=unscaled_grad if with_grad else recon
    )
    block_sums = recon.new_empty((recon.shape[0], programs // recon.shape[0]), dtype=torch.float32)
    args = {
        "recon": recon,
        "target": target,
        "block_sums": block_sums,
        "unscaled_grad": unscaled_grad if with_grad else None,
        **likelihood.arguments(likelihood_name, scale, pixel_low),
        "ACTIVATION": activation,
        **layout,
    }
    return Launch(_forward_kernel, programs, args, warps, fuse=True), (block_sums, unscaled_grad)


def plan_backward(unscaled_grad: Tensor, grad_errors: Tensor, factor: float) -> tuple[Launch, Tensor]:
    """The backward launch, and recon's gradient, which it fills."""
    grad_recon = torch.empty_like(unscaled_grad)
    layout, programs, warps = _layout(unscaled_grad=unscaled_grad, grad_recon=grad_recon)
    args = {
        "unscaled_grad": unscaled_grad,
        "grad_errors": grad_errors,
        "grad_recon": grad_recon,
        "factor": factor,
        "grad_errors_stride": grad_errors.stride(0),
        **layout,
    }
    return Launch(_backward_kernel, programs, args, warps, fuse=True), grad_recon


@torch.library.custom_op("bvae::image_errors", mutates_args=())
def image_errors(
    recon: Tensor,
    target: Tensor,
    with_grad: bool,
    likelihood: str,
    activation: str | None,
    scale: float,
    pixel_low: float,
) -> tuple[Tensor, Tensor]:
    """The errors `[B]`, float32, and unscaled_grad, like recon; empty unless `with_grad`.

    `likelihood` is a name of the module `likelihood`; `scale` the logistic's. uint8 targets are scaled to
    [pixel_low, 1]; -1 or 0.
    """
    launch, (block_sums, unscaled_grad) = plan_forward(
        recon, target, with_grad, likelihood, activation, scale, pixel_low
    )
    launch.run(recon.device)
    return block_sums.sum(1), unscaled_grad


@image_errors.register_fake
def _(recon, target, with_grad, likelihood, activation, scale, pixel_low):
    errors = recon.new_empty(recon.shape[0], dtype=torch.float32)
    return errors, torch.empty_like(recon) if with_grad else recon.new_empty(0)


@torch.library.custom_op("bvae::image_errors_backward", mutates_args=())
def image_errors_backward(unscaled_grad: Tensor, grad_errors: Tensor, factor: float) -> Tensor:
    """The gradient of recon, like unscaled_grad."""
    launch, grad_recon = plan_backward(unscaled_grad, grad_errors, factor)
    launch.run(unscaled_grad.device)
    return grad_recon


@image_errors_backward.register_fake
def _(unscaled_grad, grad_errors, factor):
    return torch.empty_like(unscaled_grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _recon, _target, ctx.with_grad, name, _activation, scale, _pixel_low = inputs
    ctx.save_for_backward(output[1])
    ctx.factor = likelihood.factor(name, scale)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_errors: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    check_single_backward("bvae::image_errors")
    grad_recon = None
    if ctx.with_grad and grad_errors is not None:
        grad_recon = image_errors_backward(ctx.saved_tensors[0], grad_errors, ctx.factor)
    return grad_recon, None, None, None, None, None, None


image_errors.register_autograd(_differentiate, setup_context=_save)
