"""recon, target, KL, step -> the loss terms, and the gradient of recon in the same pass.

    loss = error_scale * sum(error) + weight * kld            kld = mean(KL), weight = kl_weight * kl_scale
         = error_scale * sum(error) + weight * |kld - C|      C = clamp(ratio * step, 0, max_capacity)

recon's gradient does not depend on the sum, so the pass that reads recon and target for the loss also writes
the error's `unscaled_grad`; `likelihood` has both.

    d loss / d recon = unscaled_grad * grad_scale             grad_scale = factor * error_scale

Each element is read once: 5 bytes of traffic for bfloat16 and uint8. A tensor like recon is kept for the
backward pass. The gradient is stored without its scale, because the scale of a mean is below float16's
smallest number. The backward pass multiplies by the scale and by the incoming gradient: 4 bytes more.

float16 holds the gradient of a saturated tanh coarsely: beyond |x| = 6, 1 - tanh(x)^2 is below 3e-5, where
float16's numbers lie 6e-8 apart, and at |x| = 7 a gradient may be 40% off. bfloat16 has no such range.

Programs leave partial sums; the last one to finish adds them in a fixed order, so equal inputs give equal
bits.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvae.kernels import likelihood
from bvae.kernels.completion_counters import completion_counters
from bvae.kernels.launch import Launch, check_single_backward, collapse, is_dense, power_of_two
from bvae.kernels.likelihood import error_and_grad, pixel
from bvae.kernels.tile import last_to_arrive, offsets


@triton.jit(do_not_specialize=["batch", "rows"])  # the last batch of an epoch compiles nothing
def _forward_kernel(
    recon,  # [rows, row_length] in 1 + DIMS dimensions, as target and unscaled_grad
    target,  # floating point, or uint8
    kl,  # [batch]
    step,  # 0-d int64, or None: no capacity
    kl_scale,  # 0-d float32, the factor of kl_weight that changes during training, or None for 1
    loss_out,  # the outputs: 0-d float32
    recon_out,
    kld_out,
    capacity_out,
    dloss_dkl_out,  # one number: the same for each element of kl
    unscaled_grad,  # in recon's dtype, or None
    partial_sums,  # [programs] float32
    counter,  # int32 zero
    rows,
    row_length,
    batch,
    error_scale,
    kl_weight,
    capacity_ratio,  # nats per step
    max_capacity,
    pixel_shift,  # a uint8 pixel p is (p - shift) * scale
    pixel_scale,
    low,  # of the logistic: the smallest target, half a bin, 1 / scale and the logarithm of `likelihood`
    half_bin,
    inverse_scale,
    log_width,
    kl_stride,
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
    PROGRAMS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks_per_row = tl.cdiv(row_length, BLOCK)
    error_sum = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), rows * blocks_per_row, tl.num_programs(0)):
        row = (block // blocks_per_row).to(tl.int64)
        start = (block % blocks_per_row).to(tl.int64) * BLOCK
        column = start + tl.arange(0, BLOCK)
        mask = column < row_length
        if DIMS > 1:  # a row of an image: 32-bit divisions are enough, and faster
            column = column.to(tl.int32)
        recon_ptrs = recon + row * recon_row_stride + offsets(column, sizes, recon_strides, DIMS)
        target_ptrs = target + row * target_row_stride + offsets(column, sizes, target_strides, DIMS)
        x = tl.load(recon_ptrs, mask=mask, other=0.0).to(tl.float32)
        y = pixel(tl.load(target_ptrs, mask=mask, other=0), pixel_shift, pixel_scale, LIKELIHOOD)
        error, element_grad = error_and_grad(
            x, y, low, half_bin, inverse_scale, log_width, LIKELIHOOD, ACTIVATION
        )
        error_sum += tl.where(mask, error, 0.0)
        if unscaled_grad is not None:
            offset = row * unscaled_grad_row_stride + offsets(column, sizes, unscaled_grad_strides, DIMS)
            tl.store(unscaled_grad + offset, element_grad.to(unscaled_grad.dtype.element_ty), mask=mask)
    tl.store(partial_sums + tl.program_id(0), tl.sum(error_sum, 0))
    if last_to_arrive(counter, tl.num_programs(0)):
        part = tl.arange(0, PROGRAMS_PADDED)
        part_ptrs = partial_sums + part
        parts = tl.load(part_ptrs, mask=part < tl.num_programs(0), other=0.0, cache_modifier=".cg")
        recon_term = tl.sum(parts, 0) * error_scale
        kl_sum = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, batch, BLOCK):
            image = first + tl.arange(0, BLOCK)
            kl_ptrs = kl + image.to(tl.int64) * kl_stride
            kl_sum += tl.load(kl_ptrs, mask=image < batch, other=0.0).to(tl.float32)
        count = batch.to(tl.float32)
        kld = tl.div_rn(tl.sum(kl_sum, 0), count)  # `/` is sometimes off by one bit; a kld of C must be C
        if kl_scale is not None:
            kl_weight *= tl.load(kl_scale)
        if step is None:
            capacity = tl.zeros((), tl.float32)
            kl_term = kl_weight * kld
            dloss_dkl = tl.div_rn(tl.zeros((), tl.float32) + kl_weight, count)
        else:
            capacity = tl.load(step).to(tl.float32) * capacity_ratio
            capacity = tl.where(
                capacity < 0.0, 0.0, tl.where(capacity > max_capacity, max_capacity, capacity)
            )
            excess = kld - capacity
            kl_term = kl_weight * tl.abs(excess)
            sign = tl.where(excess > 0.0, 1.0, tl.where(excess < 0.0, -1.0, 0.0))  # 0 at C, as torch's abs
            dloss_dkl = tl.div_rn(kl_weight * sign, count)
        tl.store(loss_out, recon_term + kl_term)
        tl.store(recon_out, recon_term)
        tl.store(kld_out, kld)
        tl.store(capacity_out, capacity)
        tl.store(dloss_dkl_out, dloss_dkl)


@triton.jit(do_not_specialize=["batch"])  # the last batch of an epoch compiles nothing
def _backward_kernel(
    unscaled_grad,  # [elements], dense, or None
    dloss_dkl,  # 0-d float32
    grad_loss,  # 0-d each, or None
    grad_recon_term,
    grad_kld,
    grad_recon,  # [elements] in unscaled_grad's order, or None
    grad_kl,  # [batch]
    elements,
    batch,
    grad_scale,  # the factor that unscaled_grad lacks
    BLOCK: tl.constexpr,
):
    d_loss = tl.zeros((), tl.float32)
    d_recon_term = tl.zeros((), tl.float32)
    d_kld = tl.zeros((), tl.float32)
    if grad_loss is not None:
        d_loss = tl.load(grad_loss).to(tl.float32)
    if grad_recon_term is not None:
        d_recon_term = tl.load(grad_recon_term).to(tl.float32)
    if grad_kld is not None:
        d_kld = tl.load(grad_kld).to(tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    if unscaled_grad is not None:
        g = tl.load(unscaled_grad + index, mask=index < elements, other=0.0).to(tl.float32)
        d_recon = g * (grad_scale * (d_loss + d_recon_term))
        tl.store(grad_recon + index, d_recon.to(grad_recon.dtype.element_ty), mask=index < elements)
    if start < batch:
        d_kl = d_loss * tl.load(dloss_dkl) + tl.div_rn(d_kld, batch.to(tl.float32))
        tl.store(grad_kl + index, tl.zeros((BLOCK,), tl.float32) + d_kl, mask=index < batch)


_BLOCK, _WARPS = 2048, 8  # 8 elements per thread: 16 bytes of bfloat16, 8 of uint8
_PROGRAMS = 1024  # enough to fill the largest GPU; each loops over its share. A power of two


class Options(NamedTuple):
    """An objective's options, in the order of the operation's schema."""

    kl_weight: float
    max_capacity: float
    capacity_iters: int
    likelihood: str  # "probabilities" is a bernoulli whose recon are no logits
    activation: str | None
    reduction: str
    spread: float  # the gaussian's variance, else the scale
    pixel_low: float  # a uint8 target is scaled to [pixel_low, 1]; -1 or 0


def _error_scale(recon: Tensor, options: Options) -> float:
    """The factor of the summed error in the loss."""
    terms = recon.numel() if options.reduction == "mean" else recon.shape[0]
    divisor = {"gaussian": 2.0 * options.spread, "laplace": options.spread}.get(options.likelihood, 1.0)
    return 1.0 / (divisor * terms)


def _grad_scale(recon: Tensor, options: Options) -> float:
    """The factor that turns the unscaled gradient into the loss's gradient."""
    return likelihood.factor(options.likelihood, options.spread) * _error_scale(recon, options)


def _layout(*tensors: Tensor) -> tuple[dict[str, Any], list[tuple[int, tuple[int, ...]]]]:
    """The kernel arguments that describe the rows, and each tensor's row stride and strides within a row.

    Elements are visited in the first tensor's order in memory, because a sum allows any order. If all tensors
    share that order, everything is one row; otherwise there is one row per image.
    """
    order = sorted(range(tensors[0].dim()), key=tensors[0].stride, reverse=True)
    in_memory_order = [t.permute(order) for t in tensors]
    sizes, strides = collapse(tuple(in_memory_order[0].shape), *(t.stride() for t in in_memory_order))
    rows, row_strides = 1, [0] * len(tensors)
    if len(sizes) > 1:
        rows, row_strides = in_memory_order[0].shape[0], [t.stride(0) for t in in_memory_order]
        sizes, strides = collapse(
            tuple(in_memory_order[0].shape[1:]), *(t.stride()[1:] for t in in_memory_order)
        )
    layout = {"rows": rows, "row_length": math.prod(sizes), "sizes": sizes, "DIMS": len(sizes)}
    return layout, list(zip(row_strides, strides, strict=True))


def plan_forward(
    recon: Tensor,
    target: Tensor,
    kl: Tensor,
    step: Tensor | None,
    kl_scale: Tensor | None,
    with_grad: bool,
    options: Options,
) -> tuple[Launch, list[Tensor]]:
    """The forward launch, and the outputs it fills: loss, recon, kld, capacity, dloss_dkl, unscaled_grad."""
    outputs = *terms, unscaled_grad = _outputs(recon, with_grad)
    layout, strides = _layout(recon, target, unscaled_grad if with_grad else recon)
    block = _BLOCK
    if layout["rows"] > 1:  # a short row fills a block of its own size
        block = min(max(power_of_two(layout["row_length"]), 256), _BLOCK)
    programs = min(layout["rows"] * triton.cdiv(layout["row_length"], block), _PROGRAMS)
    args = {
        "recon": recon,
        "target": target,
        "kl": kl,
        "step": step,
        "kl_scale": kl_scale,
        **dict(
            zip(("loss_out", "recon_out", "kld_out", "capacity_out", "dloss_dkl_out"), terms, strict=True)
        ),
        "unscaled_grad": unscaled_grad if with_grad else None,
        "partial_sums": recon.new_empty(programs, dtype=torch.float32),
        "counter": completion_counters(1, recon.device),
        "batch": recon.shape[0],
        "error_scale": _error_scale(recon, options),
        "kl_weight": options.kl_weight,
        "capacity_ratio": options.max_capacity / options.capacity_iters,
        "max_capacity": options.max_capacity,
        "kl_stride": kl.stride(0),
        **likelihood.arguments(options.likelihood, options.spread, options.pixel_low),
        "ACTIVATION": options.activation,
        "PROGRAMS_PADDED": _PROGRAMS,
        "BLOCK": block,
        **layout,
    }
    for name, (row_stride, inner) in zip(("recon", "target", "unscaled_grad"), strides, strict=True):
        args[f"{name}_row_stride"], args[f"{name}_strides"] = row_stride, inner
    return Launch(_forward_kernel, programs, args, block * _WARPS // _BLOCK, fuse=True), outputs


def plan_backward(
    unscaled_grad: Tensor,
    dloss_dkl: Tensor,
    grad_loss: Tensor | None,
    grad_recon_term: Tensor | None,
    grad_kld: Tensor | None,
    grad_scale: float,
    batch: int,
    kl_dtype: torch.dtype,
) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The backward launch, and the outputs it fills: the gradients of recon (like unscaled_grad) and kl."""
    assert is_dense(unscaled_grad), "the kernel walks the gradient in the order of memory"
    outputs = grad_recon, grad_kl = _backward_outputs(unscaled_grad, batch, kl_dtype)
    reaches_recon = unscaled_grad.numel() > 0
    args = {
        "unscaled_grad": unscaled_grad if reaches_recon else None,
        "dloss_dkl": dloss_dkl,
        "grad_loss": grad_loss,
        "grad_recon_term": grad_recon_term,
        "grad_kld": grad_kld,
        "grad_recon": grad_recon if reaches_recon else None,
        "grad_kl": grad_kl,
        "elements": unscaled_grad.numel(),
        "batch": batch,
        "grad_scale": grad_scale,
        "BLOCK": _BLOCK,
    }
    programs = triton.cdiv(max(unscaled_grad.numel(), batch), _BLOCK)
    return Launch(_backward_kernel, programs, args, _WARPS, fuse=True), outputs


def _outputs(recon: Tensor, with_grad: bool) -> list[Tensor]:
    """Unfilled loss, recon, kld, capacity, dloss_dkl (0-d float32); unscaled_grad, like recon or empty."""
    unscaled_grad = torch.empty_like(recon) if with_grad else recon.new_empty(0)
    return [recon.new_empty((), dtype=torch.float32) for _ in range(5)] + [unscaled_grad]


def _backward_outputs(unscaled_grad: Tensor, batch: int, kl_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(unscaled_grad), unscaled_grad.new_empty(batch, dtype=kl_dtype)


_SCHEMA = """(
    Tensor recon, Tensor target, Tensor kl, Tensor? step, Tensor? kl_scale, bool with_grad,
    float kl_weight, float max_capacity, int capacity_iters, str likelihood, str? activation, str reduction,
    float spread, float pixel_low
) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""


@torch.library.custom_op("bvae::vae_loss", mutates_args=(), schema=_SCHEMA)
def vae_loss(
    recon: Tensor,
    target: Tensor,
    kl: Tensor,
    step: Tensor | None,
    kl_scale: Tensor | None,
    with_grad: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    """loss, recon, kld, capacity, dloss_dkl (one number for all of kl), unscaled_grad (or an empty tensor).

    The arguments are those of `bvae.ops.vae_loss`, which checks them. A schema has no type for `Options`, so
    they are passed one by one. The KL's weight is the option `kl_weight`, which torch.compile and a captured
    graph freeze, times `kl_scale`, which the kernel loads. `with_grad`: whether to fill the last output.
    """
    launch, outputs = plan_forward(recon, target, kl, step, kl_scale, with_grad, Options(*options))
    launch.run(recon.device)
    return tuple(outputs)


@vae_loss.register_fake
def _(recon, target, kl, step, kl_scale, with_grad, *options):
    return tuple(_outputs(recon, with_grad))


@torch.library.custom_op("bvae::vae_loss_backward", mutates_args=())
def vae_loss_backward(
    unscaled_grad: Tensor,
    dloss_dkl: Tensor,
    grad_loss: Tensor | None,
    grad_recon_term: Tensor | None,
    grad_kld: Tensor | None,
    grad_scale: float,
    batch: int,
    kl_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients of recon (like unscaled_grad, which may be empty) and of kl (`[batch]` in kl_dtype)."""
    launch, outputs = plan_backward(
        unscaled_grad, dloss_dkl, grad_loss, grad_recon_term, grad_kld, grad_scale, batch, kl_dtype
    )
    launch.run(unscaled_grad.device)
    return outputs


@vae_loss_backward.register_fake
def _(unscaled_grad, dloss_dkl, grad_loss, grad_recon_term, grad_kld, grad_scale, batch, kl_dtype):
    return _backward_outputs(unscaled_grad, batch, kl_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    recon, _target, kl, _step, _kl_scale, ctx.with_grad, *options = inputs
    *_terms, capacity, dloss_dkl, unscaled_grad = output
    ctx.save_for_backward(unscaled_grad, dloss_dkl)  # not kl: its values may change before the backward pass
    ctx.batch, ctx.kl_dtype, ctx.arguments = kl.shape[0], kl.dtype, len(inputs)
    ctx.grad_scale = _grad_scale(recon, Options(*options))
    ctx.mark_non_differentiable(capacity, dloss_dkl, unscaled_grad)
    ctx.set_materialize_grads(False)  # no zeros are filled in for terms that nobody used


def _differentiate(
    ctx: Any, grad_loss: Tensor | None, grad_recon_term: Tensor | None, grad_kld: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    check_single_backward("bvae::vae_loss")
    unscaled_grad, dloss_dkl = ctx.saved_tensors
    reaches_recon = ctx.with_grad and not (grad_loss is None and grad_recon_term is None)
    if not reaches_recon:  # the KL alone: no pass over recon
        unscaled_grad = unscaled_grad.new_empty(0)
    grad_recon, grad_kl = vae_loss_backward(
        unscaled_grad,
        dloss_dkl,
        grad_loss,
        grad_recon_term,
        grad_kld,
        ctx.grad_scale,
        ctx.batch,
        ctx.kl_dtype,
    )
    by_recon_target_kl = grad_recon if reaches_recon else None, None, grad_kl
    return *by_recon_target_kl, *[None] * (ctx.arguments - 3)


vae_loss.register_autograd(_differentiate, setup_context=_save)
