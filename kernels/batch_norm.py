"""BatchNorm of a training batch and the LeakyReLU after it, on rows [M, C]: images in channels_last.

    xhat  = (x - mean) * rstd                   rstd = 1 / sqrt(var + eps), a channel's over the M rows
    y     = leaky_relu(xhat * weight + bias)    Ioffe and Szegedy (2015)
    g     = dy where xhat * weight + bias > 0, dy * slope elsewhere
    dbias = sum g,  dweight = sum g * xhat
    dx    = rstd * weight * (g - dbias / M - xhat * dweight / M)

Statistics and reductions are one launch, and what applies them is another: 2 + 2. In bfloat16 they move
2 + 4 bytes per element forward and 4 + 6 backward. A channel of few rows is one program's, which applies its
statistics itself and finds its rows in the cache again: 1 + 1 launches. The backward pass computes xhat and
the sign again, so nothing but x, mean and rstd is kept.

Every element of a tile keeps Welford's running mean and squares of its own rows, relative to the channel's
first row. The formula of Chan, Golub and LeVeque (1983) merges those of a program, and then the programs'.
So the variance does not cancel where the mean is large, and that of equal numbers is 0. Programs leave
partial results, which the last of them merges in a fixed order: equal inputs give equal bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvae.kernels import launch
from bvae.kernels.completion_counters import completion_counters
from bvae.kernels.launch import Launch, check_single_backward, power_of_two
from bvae.kernels.tile import last_to_arrive


@triton.jit
def normalised(x, mean, rstd, weight, bias):
    """xhat, and BatchNorm's output before the LeakyReLU: the same bits in every kernel, so one sign."""
    xhat = (x - mean) * rstd
    return xhat, xhat * weight + bias


@triton.jit
def leaky_relu(y, slope):
    return tl.where(y > 0.0, y, y * slope)


@triton.jit
def _tile(row, channel, rows, CHANNELS: tl.constexpr):
    """The offsets of a tile in [rows, CHANNELS], and which of them exist."""
    offsets = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    return offsets, (row < rows)[:, None] & (channel < CHANNELS)[None, :]


@triton.jit
def _own_tile(rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The channels, the offsets and the mask of the tile of a program that has one."""
    blocks: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    offsets, mask = _tile(row, channel, rows, CHANNELS)
    return channel, offsets, mask


@triton.jit
def vector(pointer, channel, CHANNELS: tl.constexpr):
    """`pointer` [CHANNELS] at the channels, in float32, as a row [1, ...]."""
    return tl.load(pointer + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _rows_visited(part, slot, rows, parts, ROWS: tl.constexpr):
    """How many rows the slots of a part's tile visit, as float32: its tiles are every `parts`-th."""
    stride = parts * ROWS
    return (tl.maximum(rows - part * ROWS - slot + stride - 1, 0) // stride).to(tl.float32)


@triton.jit
def _part_rows(part, rows, parts, ROWS: tl.constexpr):
    """How many rows a part has, as float32; 0 for one that does not exist."""
    tiles, rest = rows // ROWS, rows % ROWS
    whole = (tl.maximum(tiles - part + parts - 1, 0) // parts) * ROWS
    count = whole + tl.where(tiles % parts == part, rest, 0)
    return tl.where(part < parts, count, 0).to(tl.float32)


@triton.jit
def _write_statistics(
    mean, squares, first_row, mean_out, rstd_out, var_out, channel, rows, eps, CHANNELS: tl.constexpr
):
    exists = channel < CHANNELS
    mean += first_row
    rstd = 1.0 / tl.sqrt_rn(squares / rows + eps)
    tl.store(mean_out + channel, mean, mask=exists)
    tl.store(rstd_out + channel, rstd, mask=exists)
    tl.store(var_out + channel, squares / (rows - 1), mask=exists)
    return mean, rstd


@triton.jit(do_not_specialize=["rows", "parts"])  # the last batch of an epoch compiles nothing
def _statistics_kernel(
    x,  # [rows, CHANNELS]
    weight,  # [CHANNELS], as bias; None unless y is given
    bias,
    y,  # as x; None if another launch applies the statistics
    mean_out,  # [CHANNELS] float32, as the next two
    rstd_out,
    var_out,  # unbiased
    part_means,  # [parts, CHANNELS] float32, as part_squares: of the programs that share a block of channels
    part_squares,
    counters,  # int32 zeros, one for each block of channels
    rows,
    parts,
    eps,
    slope,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    slot, channel = tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)
    first_row = vector(x, channel, CHANNELS)
    means = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    visits = 0.0
    for start in range(part * ROWS, rows, parts * ROWS):
        offsets, mask = _tile(start + slot, channel, rows, CHANNELS)
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        visits += 1.0
        delta = tl.where(mask, value - first_row - means, 0.0)
        change = delta * (1.0 / visits)
        means += change
        squares += delta * (delta - change)
    visited = _rows_visited(part, slot, rows, parts, ROWS)
    mean = tl.sum(means * visited[:, None], 0) / tl.sum(visited, 0)
    distance = means - mean[None, :]
    square = tl.sum(squares + visited[:, None] * distance * distance, 0)
    first_row = tl.reshape(first_row, (COLUMNS,))
    if y is not None:
        mean, rstd = _write_statistics(
            mean, square, first_row, mean_out, rstd_out, var_out, channel, rows, eps, CHANNELS
        )
        w, b = vector(weight, channel, CHANNELS), vector(bias, channel, CHANNELS)
        for start in range(0, rows, ROWS):
            offsets, mask = _tile(start + slot, channel, rows, CHANNELS)
            value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
            _, before = normalised(value, mean[None, :], rstd[None, :], w, b)
            tl.store(y + offsets, leaky_relu(before, slope).to(y.dtype.element_ty), mask=mask)
    else:
        exists = channel < CHANNELS
        tl.store(part_means + part * CHANNELS + channel, mean, mask=exists)
        tl.store(part_squares + part * CHANNELS + channel, square, mask=exists)
        if last_to_arrive(counters + block, parts):
            # the parts' means, and then their squares about the mean of all: each sum in the same order
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in range(0, parts, ROWS):
                offsets, mask = _tile(first + slot, channel, parts, CHANNELS)
                means = tl.load(part_means + offsets, mask=mask, other=0.0, cache_modifier=".cg")
                sums += means * _part_rows(first + slot, rows, parts, ROWS)[:, None]
            mean = tl.sum(sums, 0) / rows
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in range(0, parts, ROWS):
                offsets, mask = _tile(first + slot, channel, parts, CHANNELS)
                means = tl.load(part_means + offsets, mask=mask, other=0.0, cache_modifier=".cg")
                squares = tl.load(part_squares + offsets, mask=mask, other=0.0, cache_modifier=".cg")
                distance = means - mean[None, :]
                sums += squares + _part_rows(first + slot, rows, parts, ROWS)[:, None] * distance * distance
            _write_statistics(
                mean, tl.sum(sums, 0), first_row, mean_out, rstd_out, var_out, channel, rows, eps, CHANNELS
            )


@triton.jit(do_not_specialize=["rows"])
def _apply_kernel(
    x,  # [rows, CHANNELS], as y
    weight,
    bias,
    mean,
    rstd,
    y,
    rows,
    slope,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    channel, offsets, mask = _own_tile(rows, CHANNELS, ROWS, COLUMNS)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    _, before = normalised(
        value,
        vector(mean, channel, CHANNELS),
        vector(rstd, channel, CHANNELS),
        vector(weight, channel, CHANNELS),
        vector(bias, channel, CHANNELS),
    )
    tl.store(y + offsets, leaky_relu(before, slope).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "parts"])
def _reduce_kernel(
    grad_y,  # [rows, CHANNELS], as x
    x,
    weight,
    bias,
    mean,
    rstd,
    grad_x,  # as x; None if another launch computes it
    grad_weight,  # [CHANNELS] float32, as grad_bias
    grad_bias,
    part_weights,  # [parts, CHANNELS] float32, as part_biases
    part_biases,
    counters,
    rows,
    parts,
    slope,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    slot, channel = tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < CHANNELS
    m, r = vector(mean, channel, CHANNELS), vector(rstd, channel, CHANNELS)
    w, b = vector(weight, channel, CHANNELS), vector(bias, channel, CHANNELS)
    weight_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(part * ROWS, rows, parts * ROWS):
        offsets, mask = _tile(start + slot, channel, rows, CHANNELS)
        xhat, g = _grad_before(grad_y, x, offsets, mask, m, r, w, b, slope)
        weight_sums += tl.where(mask, g * xhat, 0.0)
        bias_sums += g
    d_weight, d_bias = tl.sum(weight_sums, 0), tl.sum(bias_sums, 0)
    if grad_x is not None:
        tl.store(grad_weight + channel, d_weight, mask=exists)
        tl.store(grad_bias + channel, d_bias, mask=exists)
        for start in range(0, rows, ROWS):
            offsets, mask = _tile(start + slot, channel, rows, CHANNELS)
            xhat, g = _grad_before(grad_y, x, offsets, mask, m, r, w, b, slope)
            d_x = grad_input(g, xhat, r * w, d_weight[None, :], d_bias[None, :], rows)
            tl.store(grad_x + offsets, d_x.to(grad_x.dtype.element_ty), mask=mask)
    else:
        tl.store(part_weights + part * CHANNELS + channel, d_weight, mask=exists)
        tl.store(part_biases + part * CHANNELS + channel, d_bias, mask=exists)
        if last_to_arrive(counters + block, parts):
            weight_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            bias_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in range(0, parts, ROWS):
                offsets, mask = _tile(first + slot, channel, parts, CHANNELS)
                weight_sums += tl.load(part_weights + offsets, mask=mask, other=0.0, cache_modifier=".cg")
                bias_sums += tl.load(part_biases + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(grad_weight + channel, tl.sum(weight_sums, 0), mask=exists)
            tl.store(grad_bias + channel, tl.sum(bias_sums, 0), mask=exists)


@triton.jit
def _grad_before(grad_y, x, offsets, mask, mean, rstd, weight, bias, slope):
    """xhat, and the gradient of BatchNorm's output; 0 outside of the mask."""
    g = tl.load(grad_y + offsets, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    xhat, before = normalised(value, mean, rstd, weight, bias)
    return xhat, tl.where(before > 0.0, g, g * slope)


@triton.jit
def grad_input(g, xhat, scale, grad_weight, grad_bias, rows):
    """The gradient of BatchNorm's input from that of its output, `g`."""
    return scale * (g - (grad_bias + xhat * grad_weight) / rows)


@triton.jit(do_not_specialize=["rows"])
def _grad_kernel(
    grad_y,  # [rows, CHANNELS], as x and grad_x
    x,
    weight,
    bias,
    mean,
    rstd,
    grad_weight,
    grad_bias,
    grad_x,
    rows,
    slope,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    channel, offsets, mask = _own_tile(rows, CHANNELS, ROWS, COLUMNS)
    r, w = vector(rstd, channel, CHANNELS), vector(weight, channel, CHANNELS)
    m, b = vector(mean, channel, CHANNELS), vector(bias, channel, CHANNELS)
    xhat, g = _grad_before(grad_y, x, offsets, mask, m, r, w, b, slope)
    d_weight, d_bias = vector(grad_weight, channel, CHANNELS), vector(grad_bias, channel, CHANNELS)
    d_x = grad_input(g, xhat, r * w, d_weight, d_bias, rows)
    tl.store(grad_x + offsets, d_x.to(grad_x.dtype.element_ty), mask=mask)


_FEW_ROWS = (
    2304  # 256 channels at 4 x 4 for 144 images: a program reads its 16 channels twice, from the cache
)
_PROGRAMS = 512  # in a launch that reduces: 4 on each SM of the largest GPU
_ELEMENTS = 16  # of a tile per thread: two loads of 16 bytes in bfloat16


def takes(x: Tensor) -> bool:
    """Whether the kernels can read x [N, C, H, W]: as rows of channels, without a copy."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return x.dim() == 4 and x.dtype in dtypes and x.is_contiguous(memory_format=torch.channels_last)


def _layout(x: Tensor, *, few: bool, reduces: bool) -> tuple[dict[str, Any], int, int, int]:
    """The kernel arguments that describe the rows; blocks of channels, parts of the rows, and warps.

    The rows have one part if they are `few`, and one for each tile if the launch does not reduce.
    """
    channels = x.shape[1]
    rows = x.numel() // channels
    columns, warps = (16, 16) if few else (32, 8)
    if reduces and not few and launch.ON_AMD:
        warps = 1  # the programs announce blocks: see `last_to_arrive`
    columns = min(columns, power_of_two(channels))
    tile = _ELEMENTS * 32 * warps // columns
    blocks, parts = triton.cdiv(channels, columns), triton.cdiv(rows, tile)
    if reduces:
        parts = 1 if few else min(parts, max(1, _PROGRAMS // blocks))
    return {"rows": rows, "CHANNELS": channels, "ROWS": tile, "COLUMNS": columns}, blocks, parts, warps


def _are_few(x: Tensor) -> bool:
    return x.numel() // x.shape[1] <= _FEW_ROWS


def _partials(x: Tensor, few: bool, blocks: int, parts: int) -> tuple[Tensor | None, ...]:
    """Two partial results of each program, and the counters; none if the rows are few."""
    if few:
        return None, None, None
    first, second = (x.new_empty((parts, x.shape[1]), dtype=torch.float32) for _ in range(2))
    return first, second, completion_counters(blocks, x.device)


def plan_statistics(
    x: Tensor, weight: Tensor, bias: Tensor, y: Tensor | None, eps: float, slope: float
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The launch of the statistics, and the outputs it fills: mean, rstd and unbiased variance `[C]`.

    Given y, the rows must be few, and the launch fills it too.
    """
    few = y is not None
    layout, blocks, parts, warps = _layout(x, few=few, reduces=True)
    mean, rstd, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(3))
    part_means, part_squares, counters = _partials(x, few, blocks, parts)
    args = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "y": y,
        "mean_out": mean,
        "rstd_out": rstd,
        "var_out": var,
        "part_means": part_means,
        "part_squares": part_squares,
        "counters": counters,
        "parts": parts,
        "eps": eps,
        "slope": slope,
        **layout,
    }
    return Launch(_statistics_kernel, blocks * parts, args, warps, fuse=True), (mean, rstd, var)


def plan_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The one or two forward launches, and the outputs they fill: y, mean, rstd and unbiased variance."""
    y, few = torch.empty_like(x), _are_few(x)
    statistics, (mean, rstd, var) = plan_statistics(x, weight, bias, y if few else None, eps, slope)
    outputs = y, mean, rstd, var
    if few:
        return [statistics], outputs
    layout, blocks, parts, warps = _layout(x, few=False, reduces=False)
    args = {"x": x, "weight": weight, "bias": bias, "mean": mean, "rstd": rstd, "y": y, "slope": slope}
    return [statistics, Launch(_apply_kernel, blocks * parts, {**args, **layout}, warps, fuse=True)], outputs


def plan_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, slope: float
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The one or two backward launches, and the outputs they fill: the gradients of x, weight and bias."""
    grad_x = torch.empty_like(x)
    grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
    few = _are_few(x)
    layout, blocks, parts, warps = _layout(x, few=few, reduces=True)
    part_weights, part_biases, counters = _partials(x, few, blocks, parts)
    given = {"grad_y": grad_y, "x": x, "weight": weight, "bias": bias, "mean": mean, "rstd": rstd}
    grads = {"grad_x": grad_x, "grad_weight": grad_weight, "grad_bias": grad_bias}
    args = {
        **given,
        **grads,
        "grad_x": grad_x if few else None,
        "part_weights": part_weights,
        "part_biases": part_biases,
        "counters": counters,
        "parts": parts,
        "slope": slope,
        **layout,
    }
    launches = [Launch(_reduce_kernel, blocks * parts, args, warps, fuse=True)]
    if not few:
        layout, blocks, parts, warps = _layout(x, few=False, reduces=False)
        args = {**given, **grads, "slope": slope, **layout}
        launches.append(Launch(_grad_kernel, blocks * parts, args, warps, fuse=True))
    return launches, (grad_x, grad_weight, grad_bias)


@torch.library.custom_op("bvae::batch_norm_leaky_relu", mutates_args=())
def batch_norm_leaky_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like x, and the batch's mean, rstd and unbiased variance `[C]`; for x that `takes` allows."""
    launches, outputs = plan_forward(x, weight, bias, eps, slope)
    for each in launches:
        each.run(x.device)
    return outputs


@batch_norm_leaky_relu.register_fake
def _(x, weight, bias, eps, slope):
    mean, rstd, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(3))
    return torch.empty_like(x), mean, rstd, var


@torch.library.custom_op("bvae::batch_norm_leaky_relu_backward", mutates_args=())
def batch_norm_leaky_relu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, like x, and of weight and bias, float32. grad_y may have any strides."""
    grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    launches, outputs = plan_backward(grad_y, x, weight, bias, mean, rstd, slope)
    for each in launches:
        each.run(x.device)
    return outputs


@batch_norm_leaky_relu_backward.register_fake
def _(grad_y, x, weight, bias, mean, rstd, slope):
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _eps, ctx.slope = inputs
    _y, mean, rstd, var = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd, var)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    check_single_backward("bvae::batch_norm_leaky_relu")
    if grad_y is None:
        return None, None, None, None, None
    x, weight, bias, mean, rstd = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = batch_norm_leaky_relu_backward(
        grad_y, x, weight, bias, mean, rstd, ctx.slope
    )
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None


batch_norm_leaky_relu.register_autograd(_differentiate, setup_context=_save)
