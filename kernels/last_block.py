"""The decoder's last block and the loss: BatchNorm, LeakyReLU, 3 x 3 convolution to pixels, error per image.

    a         = leaky_relu(batch_norm(x))                        x [B, C, H, W], `batch_norm` has the formulas
    recon     = conv3x3(a, weight) + bias                        1 or 3 channels, padding 1
    errors[b] = sum of error(recon[b], target[b])                `likelihood` has the errors
    g         = d errors / d recon, without its factor           the same pass writes it

Neither a nor recon is stored. After the statistics, one launch reads x and the target and writes g: of 32
channels in bfloat16, 64 + 3 + 6 bytes per pixel. Three launches are the backward pass: one reads x and g and
sums the gradients of the parameters, one adds the programs' sums, one reads both again and writes x's
gradient. With the statistics that are 341 bytes per pixel, 1.4 MB for an image of 64 x 64.

A 3 x 3 convolution to 3 channels is 27 products of each pixel's channels with a vector. Forward, one matrix
product computes them for a tile of pixels, and each output adds 27 of them from its neighbours: pixels
exchange these 27 numbers and not their channels, which are normalised once. Backward, the 27 gradients of
the outputs around a pixel are its row of one matrix: times the weights it is a's gradient, and times a the
weights'. The products are of bfloat16 or float16: tensor cores would round float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvae.kernels import batch_norm, launch, likelihood
from bvae.kernels.batch_norm import grad_input, leaky_relu, normalised, vector
from bvae.kernels.completion_counters import completion_counters
from bvae.kernels.launch import Launch, check_single_backward, power_of_two
from bvae.kernels.likelihood import error_and_grad, pixel
from bvae.kernels.tile import last_to_arrive


@triton.jit
def _tap_offsets(tap, channel, strides, OUT: tl.constexpr):
    """Where a weight [OUT, CHANNELS, 3, 3] has `tap` = 3 x 3 positions x OUT at the channels."""
    position = tap // OUT
    offsets = (tap % OUT) * strides[0] + channel * strides[1]
    return offsets + (position // 3) * strides[2] + (position % 3) * strides[3]


@triton.jit
def _taps(weight, tap, channel, strides, CHANNELS: tl.constexpr, OUT: tl.constexpr):
    """The weights of the taps at the channels; the arguments broadcast. 0 beyond."""
    offsets = _tap_offsets(tap, channel, strides, OUT)
    return tl.load(weight + offsets, mask=(tap < 9 * OUT) & (channel < CHANNELS), other=0.0)


@triton.jit
def _squared_error(x, y, error, element_grad, LIKELIHOOD: tl.constexpr, ACTIVATION: tl.constexpr):
    """(v - y)^2 of the activated output v, which a Bernoulli's logits have too; from what is known of it."""
    if LIKELIHOOD == "gaussian":
        square = error
    elif LIKELIHOOD == "laplace":
        square = error * error
    elif LIKELIHOOD == "bernoulli":
        square = element_grad * element_grad
    else:
        square, _ = error_and_grad(x, y, 0.0, 0.0, 0.0, 0.0, "gaussian", ACTIVATION)
    return square


@triton.jit
def _forward_kernel(
    x,  # [batch, HEIGHT, WIDTH, CHANNELS]
    norm_weight,  # [CHANNELS], as the next three
    norm_bias,
    mean,
    rstd,
    weight,  # [OUT, CHANNELS, 3, 3]
    bias,  # [OUT]
    target,  # [batch, OUT, HEIGHT, WIDTH], floating point or uint8
    unscaled_grad,  # [batch, HEIGHT, WIDTH, OUT] in x's dtype, or None
    sums,  # [batch, tiles, 2 + OUT] float32: of errors, of squared errors, of each channel's unscaled_grad
    errors,  # [batch] float32, as squares
    squares,
    grad_sums,  # [batch, OUT] float32
    counters,  # [batch] int32 zeros
    slope,
    pixel_shift,
    pixel_scale,
    low,
    half_bin,
    inverse_scale,
    log_width,
    weight_strides,
    target_strides,
    LIKELIHOOD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile, whose first and last belong to its neighbours' outputs
    COLUMNS: tl.constexpr,  # at least WIDTH
    CHANNELS_PADDED: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
    TILES_PADDED: tl.constexpr,
):
    tiles: tl.constexpr = (HEIGHT + ROWS - 3) // (ROWS - 2)
    image, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    place = tl.arange(0, ROWS * COLUMNS)
    tile_row, column = place // COLUMNS, place % COLUMNS
    row = tile * (ROWS - 2) - 1 + tile_row
    inside = (row >= 0) & (row < HEIGHT) & (column < WIDTH)
    channel, tap = tl.arange(0, CHANNELS_PADDED), tl.arange(0, TAPS_PADDED)
    position = row * WIDTH + column
    x_offsets = image * (HEIGHT * WIDTH * CHANNELS) + position[:, None] * CHANNELS + channel[None, :]
    mask = inside[:, None] & (channel < CHANNELS)[None, :]
    value = tl.load(x + x_offsets, mask=mask, other=0.0).to(tl.float32)
    _, before = normalised(
        value,
        vector(mean, channel, CHANNELS),
        vector(rstd, channel, CHANNELS),
        vector(norm_weight, channel, CHANNELS),
        vector(norm_bias, channel, CHANNELS),
    )
    a = tl.where(mask, leaky_relu(before, slope), 0.0).to(x.dtype.element_ty)
    w = _taps(weight, tap[None, :], channel[:, None], weight_strides, CHANNELS, OUT).to(x.dtype.element_ty)
    products = tl.dot(a, w)  # [places, taps]
    down, right = tap // OUT // 3 - 1, tap // OUT % 3 - 1
    neighbour = place[:, None] + (down * COLUMNS + right)[None, :]
    neighbour = tl.minimum(tl.maximum(neighbour, 0), ROWS * COLUMNS - 1)
    neighbours_column = column[:, None] + right[None, :]
    is_neighbour = (neighbours_column >= 0) & (neighbours_column < WIDTH) & (tap < 9 * OUT)[None, :]
    products = tl.where(is_neighbour, tl.gather(products, neighbour, 0), 0.0)
    is_output = inside & (tile_row > 0) & (tile_row < ROWS - 1)
    target_offsets = image * target_strides[0] + row * target_strides[2] + column * target_strides[3]
    sums += (image * tiles + tile) * (2 + OUT)
    error_sum = tl.zeros((ROWS * COLUMNS,), tl.float32)
    square_sum = tl.zeros((ROWS * COLUMNS,), tl.float32)
    for out in tl.static_range(OUT):
        recon = tl.sum(tl.where((tap % OUT == out)[None, :], products, 0.0), 1)
        recon += tl.load(bias + out).to(tl.float32)
        y = tl.load(target + target_offsets + out * target_strides[1], mask=is_output, other=0)
        y = pixel(y, pixel_shift, pixel_scale, LIKELIHOOD)
        error, g = error_and_grad(recon, y, low, half_bin, inverse_scale, log_width, LIKELIHOOD, ACTIVATION)
        square = _squared_error(recon, y, error, g, LIKELIHOOD, ACTIVATION)
        error_sum += tl.where(is_output, error, 0.0)
        square_sum += tl.where(is_output, square, 0.0)
        if unscaled_grad is not None:
            g_offsets = (image * (HEIGHT * WIDTH) + position) * OUT + out
            tl.store(unscaled_grad + g_offsets, g.to(unscaled_grad.dtype.element_ty), mask=is_output)
            tl.store(sums + 2 + out, tl.sum(tl.where(is_output, g, 0.0), 0))
    tl.store(sums, tl.sum(error_sum, 0))
    tl.store(sums + 1, tl.sum(square_sum, 0))
    if last_to_arrive(counters + image, tiles):
        part = tl.arange(0, TILES_PADDED)
        parts = sums - tile * (2 + OUT) + part * (2 + OUT)
        exists = part < tiles
        tl.store(errors + image, tl.sum(tl.load(parts, mask=exists, other=0.0, cache_modifier=".cg"), 0))
        square_sums = tl.load(parts + 1, mask=exists, other=0.0, cache_modifier=".cg")
        tl.store(squares + image, tl.sum(square_sums, 0))
        if unscaled_grad is not None:
            for out in tl.static_range(OUT):
                channel_sums = tl.load(parts + 2 + out, mask=exists, other=0.0, cache_modifier=".cg")
                tl.store(grad_sums + image * OUT + out, tl.sum(channel_sums, 0))


@triton.jit
def _around(
    unscaled_grad,
    image,
    place,
    tap,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
):
    """The unscaled gradients of the outputs that each place of an image is a tap of [places, taps]; or 0."""
    row, column = place // WIDTH, place % WIDTH
    down, right = tap // OUT // 3 - 1, tap // OUT % 3 - 1
    out_row, out_column = row[:, None] - down[None, :], column[:, None] - right[None, :]
    is_output = (out_row >= 0) & (out_row < HEIGHT) & (out_column >= 0) & (out_column < WIDTH)
    is_output &= (place < HEIGHT * WIDTH)[:, None] & (tap < 9 * OUT)[None, :]
    offsets = image * (HEIGHT * WIDTH * OUT) + (out_row * WIDTH + out_column) * OUT + (tap % OUT)[None, :]
    return tl.load(unscaled_grad + offsets, mask=is_output, other=0.0)


@triton.jit(do_not_specialize=["batch"])
def _reduce_kernel(
    x,  # [batch, HEIGHT, WIDTH, CHANNELS]
    norm_weight,
    norm_bias,
    mean,
    rstd,
    weight,
    unscaled_grad,  # [batch, HEIGHT, WIDTH, OUT]
    grad_errors,  # [batch]
    sums,  # [programs, TAPS_PADDED + 2, CHANNELS_PADDED] float32: of weight, norm_bias and norm_weight
    batch,
    factor,
    grad_errors_stride,
    slope,
    weight_strides,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
):
    """Sum over a program's tiles of places q, for the channels c and the taps j of the outputs:

        dweight[c, j]    = sum_q a[q, c] * around[q, j]                    around: g of tap j's output
        dnorm_bias[c]    = sum_q d_before[q, c]                            d_before = da * leaky_relu'
                         = sum_j weight[c, j] * sum_q leaky_relu'[q, c] * around[q, j]
        dnorm_weight[c]  = sum_q d_before[q, c] * xhat[q, c]               in the same way

    All are products of matrices with `around`, and da is not needed. leaky_relu' is slope + (1 - slope) *
    positive: 16 bits would round the slope.
    """
    channel, tap = tl.arange(0, CHANNELS_PADDED), tl.arange(0, TAPS_PADDED)
    m, r = vector(mean, channel, CHANNELS), vector(rstd, channel, CHANNELS)
    nw, nb = vector(norm_weight, channel, CHANNELS), vector(norm_bias, channel, CHANNELS)
    ones = tl.full((PLACES, CHANNELS_PADDED), 1.0, tl.float32).to(x.dtype.element_ty)
    products = tl.zeros((4 * CHANNELS_PADDED, TAPS_PADDED), tl.float32)
    tiles: tl.constexpr = (HEIGHT * WIDTH + PLACES - 1) // PLACES
    # no loads ahead of the loop: on gfx942 their addresses spill
    for tile in tl.range(tl.program_id(0), batch * tiles, tl.num_programs(0), num_stages=1):
        image = tl.zeros((), tl.int64) + tile // tiles  # an int in the interpreter
        place = (tile % tiles) * PLACES + tl.arange(0, PLACES)
        scale = factor * tl.load(grad_errors + image * grad_errors_stride).to(tl.float32)
        around = _around(unscaled_grad, image, place, tap, HEIGHT, WIDTH, OUT)
        mask = (place < HEIGHT * WIDTH)[:, None] & (channel < CHANNELS)[None, :]
        offsets = image * (HEIGHT * WIDTH * CHANNELS) + place[:, None] * CHANNELS + channel[None, :]
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        xhat, before = normalised(value, m, r, nw, nb)  # beyond the image `around` is 0
        a = leaky_relu(before, slope).to(x.dtype.element_ty)
        positive = tl.where(before > 0.0, 1.0, 0.0).to(x.dtype.element_ty)
        sloped = tl.where(before > 0.0, xhat, xhat * slope).to(x.dtype.element_ty)
        # side by side, because one tall product suits tensor cores better than four flat ones
        factors = tl.join(tl.join(a, positive), tl.join(sloped, ones))  # [places, channels, 2, 2]
        factors = tl.trans(tl.reshape(factors, (PLACES, 4 * CHANNELS_PADDED)))
        products += tl.dot(factors, around) * scale
    products = tl.permute(tl.reshape(products, (CHANNELS_PADDED, 2, 2, TAPS_PADDED)), (0, 3, 1, 2))
    first, second = tl.split(products)
    by_a, by_positive = tl.split(first)  # [channels, taps], as all that follows
    by_sloped, by_one = tl.split(second)
    w = _taps(weight, tap[None, :], channel[:, None], weight_strides, CHANNELS, OUT)
    w = w.to(x.dtype.element_ty).to(tl.float32)
    sums += tl.program_id(0) * ((TAPS_PADDED + 2) * CHANNELS_PADDED) + channel
    tl.store(sums[:, None] + tap[None, :] * CHANNELS_PADDED, by_a)
    by_derivative = slope * by_one + (1.0 - slope) * by_positive
    tl.store(sums + TAPS_PADDED * CHANNELS_PADDED, tl.sum(w * by_derivative, 1))
    tl.store(sums + (TAPS_PADDED + 1) * CHANNELS_PADDED, tl.sum(w * by_sloped, 1))


@triton.jit(do_not_specialize=["batch", "parts"])
def _sum_kernel(
    sums,  # [parts, TAPS_PADDED + 2, CHANNELS_PADDED] of `_reduce_kernel`
    grad_sums,  # [batch, OUT] of the forward kernel
    grad_errors,
    grad_weight,  # the outputs: [OUT, CHANNELS, 3, 3]
    grad_bias,  # [OUT] float32, as the next two
    grad_norm_weight,  # [CHANNELS]
    grad_norm_bias,
    batch,
    parts,
    factor,
    grad_errors_stride,
    weight_strides,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns: tl.constexpr = (TAPS_PADDED + 2) * CHANNELS_PADDED
    column, slot = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PARTS)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + slot
        mask = (part < parts)[:, None] & (column < columns)[None, :]
        total += tl.load(sums + part.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0)
    grad = tl.sum(total, 0)
    tap, channel = column // CHANNELS_PADDED, column % CHANNELS_PADDED
    exists = channel < CHANNELS
    offsets = _tap_offsets(tap, channel, weight_strides, OUT)
    tl.store(grad_weight + offsets, grad, mask=exists & (tap < 9 * OUT))
    tl.store(grad_norm_bias + channel, grad, mask=exists & (tap == TAPS_PADDED))
    tl.store(grad_norm_weight + channel, grad, mask=exists & (tap == TAPS_PADDED + 1))
    if tl.program_id(0) < OUT:
        out = tl.program_id(0)
        bias_sums = tl.zeros((PARTS,), tl.float32)
        for first in range(0, batch, PARTS):
            image = first + slot
            mask = image < batch
            scale = tl.load(grad_errors + image * grad_errors_stride, mask=mask, other=0.0).to(tl.float32)
            bias_sums += scale * tl.load(grad_sums + image * OUT + out, mask=mask, other=0.0)
        tl.store(grad_bias + out, factor * tl.sum(bias_sums, 0))


@triton.jit(do_not_specialize=["batch"])
def _grad_kernel(
    x,
    norm_weight,
    norm_bias,
    mean,
    rstd,
    weight,
    unscaled_grad,
    grad_errors,
    grad_norm_weight,
    grad_norm_bias,
    grad_x,  # as x
    batch,
    factor,
    grad_errors_stride,
    slope,
    weight_strides,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS_PADDED: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
):
    tiles: tl.constexpr = (HEIGHT * WIDTH + PLACES - 1) // PLACES
    image = (tl.program_id(0) // tiles).to(tl.int64)
    place = (tl.program_id(0) % tiles) * PLACES + tl.arange(0, PLACES)
    channel, tap = tl.arange(0, CHANNELS_PADDED), tl.arange(0, TAPS_PADDED)
    w = _taps(weight, tap[:, None], channel[None, :], weight_strides, CHANNELS, OUT).to(x.dtype.element_ty)
    r, nw = vector(rstd, channel, CHANNELS), vector(norm_weight, channel, CHANNELS)
    scale = factor * tl.load(grad_errors + image * grad_errors_stride).to(tl.float32)
    around = _around(unscaled_grad, image, place, tap, HEIGHT, WIDTH, OUT)
    mask = (place < HEIGHT * WIDTH)[:, None] & (channel < CHANNELS)[None, :]
    offsets = image * (HEIGHT * WIDTH * CHANNELS) + place[:, None] * CHANNELS + channel[None, :]
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    m, b = vector(mean, channel, CHANNELS), vector(norm_bias, channel, CHANNELS)
    xhat, before = normalised(value, m, r, nw, b)
    g = tl.dot(around, w) * scale
    g = tl.where(before > 0.0, g, g * slope)
    d_weight, d_bias = vector(grad_norm_weight, channel, CHANNELS), vector(grad_norm_bias, channel, CHANNELS)
    d_x = grad_input(g, xhat, r * nw, d_weight, d_bias, batch * (HEIGHT * WIDTH))
    tl.store(grad_x + offsets, d_x.to(grad_x.dtype.element_ty), mask=mask)


_PLACES = 512  # of a forward tile: 8 rows of 64 pixels, which give 6 rows of outputs
_WIDEST = _PLACES // 4  # a tile of less than four rows would compute more than twice the outputs
_MOST_CHANNELS = 64
_BACKWARD_PLACES, _BACKWARD_WARPS = 128, 8
_PROGRAMS = 528  # that reduce: 4 on each SM of an H100
_PARTS, _COLUMNS = 128, 16  # of a tile of their sums; 18 programs or more add them, one for each of OUT


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels compute the block: x of 16 bits, in rows of up to 64 channels, 128 pixels wide."""
    return (
        batch_norm.takes(x)
        and x.dtype != torch.float32
        and x.shape[1] <= _MOST_CHANNELS
        and x.shape[3] <= _WIDEST
        and weight.shape[0] in (1, 3)
        and tuple(weight.shape[2:]) == (3, 3)
    )


def _sizes(x: Tensor, weight: Tensor) -> dict[str, Any]:
    _, channels, height, width = x.shape
    out = weight.shape[0]
    return {
        "HEIGHT": height,
        "WIDTH": width,
        "CHANNELS": channels,
        "OUT": out,
        "CHANNELS_PADDED": max(power_of_two(channels), 16),  # a matrix product's smallest sides
        "TAPS_PADDED": power_of_two(9 * out),
        "weight_strides": weight.stride(),
    }


def plan_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    with_grad: bool,
    eps: float,
    slope: float,
    likelihood_name: str,
    activation: str | None,
    scale: float,
    pixel_low: float,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The two forward launches and the outputs they fill, in the order of `last_block`'s."""
    outputs = _outputs(x, weight, with_grad)
    errors, squares, unscaled_grad, grad_sums, *_ = outputs
    statistics, (mean, rstd, var) = batch_norm.plan_statistics(x, norm_weight, norm_bias, None, eps, slope)
    sizes = _sizes(x, weight)
    columns = power_of_two(x.shape[3])
    rows = _PLACES // columns
    tiles = triton.cdiv(x.shape[2], rows - 2)
    args = {
        "x": x,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "mean": mean,
        "rstd": rstd,
        "weight": weight,
        "bias": bias,
        "target": target,
        "unscaled_grad": unscaled_grad if with_grad else None,
        "sums": errors.new_empty((x.shape[0], tiles, 2 + weight.shape[0])),
        "errors": errors,
        "squares": squares,
        "grad_sums": grad_sums,
        "counters": completion_counters(x.shape[0], x.device),
        "slope": slope,
        "target_strides": target.stride(),
        "ROWS": rows,
        "COLUMNS": columns,
        "TILES_PADDED": power_of_two(tiles),
        "ACTIVATION": activation,
        **likelihood.arguments(likelihood_name, scale, pixel_low),
        **sizes,
    }
    warps = 8 if launch.ON_AMD else 16  # one pixel per thread: a warp of AMD has 64
    forward = Launch(_forward_kernel, x.shape[0] * tiles, args, warps, fuse=True)
    return [statistics, forward], (errors, squares, unscaled_grad, grad_sums, mean, rstd, var)


def plan_backward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    unscaled_grad: Tensor,
    grad_sums: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_errors: Tensor,
    factor: float,
    slope: float,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """The three backward launches, and the outputs they fill: the gradients of the first four and of bias."""
    outputs = _grads(x, weight)
    grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias = outputs
    sizes = _sizes(x, weight)
    batch, tiles = x.shape[0], triton.cdiv(x.shape[2] * x.shape[3], _BACKWARD_PLACES)
    programs = min(batch * tiles, _PROGRAMS)
    columns = (sizes["TAPS_PADDED"] + 2) * sizes["CHANNELS_PADDED"]
    sums = mean.new_empty((programs, columns))
    shared = {
        "grad_errors": grad_errors,
        "grad_errors_stride": grad_errors.stride(0),
        "factor": factor,
        "batch": batch,
        **sizes,
    }
    given = {
        "x": x,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "mean": mean,
        "rstd": rstd,
        "weight": weight,
        "unscaled_grad": unscaled_grad,
        "slope": slope,
        "PLACES": _BACKWARD_PLACES,
        **shared,
    }
    grads_of_norm = {"grad_norm_weight": grad_norm_weight, "grad_norm_bias": grad_norm_bias}
    totals = {
        "sums": sums,
        "grad_sums": grad_sums,
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
        "parts": programs,
        "PARTS": _PARTS,
        "COLUMNS": _COLUMNS,
        **grads_of_norm,
        **shared,
        "weight_strides": grad_weight.stride(),
    }
    launches = [
        Launch(_reduce_kernel, programs, {**given, "sums": sums}, _BACKWARD_WARPS, fuse=True),
        Launch(_sum_kernel, triton.cdiv(columns, _COLUMNS), totals, 4, fuse=True),
        Launch(
            _grad_kernel,
            batch * tiles,
            {**given, **grads_of_norm, "grad_x": grad_x},
            _BACKWARD_WARPS,
            fuse=True,
        ),
    ]
    return launches, outputs


def _outputs(x: Tensor, weight: Tensor, with_grad: bool) -> tuple[Tensor, ...]:
    """The unfilled outputs of `last_block`."""
    batch, channels, height, width = x.shape
    out = weight.shape[0]
    errors, squares = (x.new_empty(batch, dtype=torch.float32) for _ in range(2))
    unscaled_grad = x.new_empty((batch, height, width, out) if with_grad else 0)
    grad_sums = x.new_empty((batch, out) if with_grad else 0, dtype=torch.float32)
    return errors, squares, unscaled_grad, grad_sums, *(errors.new_empty(channels) for _ in range(3))


def _grads(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The unfilled gradients of x, norm_weight, norm_bias, weight and bias; those of vectors are float32."""
    sizes = x.shape[1], x.shape[1], weight.shape[0]
    norm_weight, norm_bias, bias = (x.new_empty(size, dtype=torch.float32) for size in sizes)
    return torch.empty_like(x), norm_weight, norm_bias, torch.empty_like(weight), bias


@torch.library.custom_op("bvae::last_block", mutates_args=())
def last_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    with_grad: bool,
    eps: float,
    slope: float,
    likelihood: str,
    activation: str | None,
    scale: float,
    pixel_low: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """errors `[B]`, squared errors `[B]`; unscaled_grad, its sums; BatchNorm's mean, rstd, unbiased variance.

    For x and weight that `takes` allows. The target is `[B, OUT, H, W]` of any strides; the last four
    arguments are those of `image_errors`. unscaled_grad `[B, H, W, OUT]` and its sums `[B, OUT]` are empty
    unless `with_grad`.
    """
    options = with_grad, eps, slope, likelihood, activation, scale, pixel_low
    launches, outputs = plan_forward(x, norm_weight, norm_bias, weight, bias, target, *options)
    for each in launches:
        each.run(x.device)
    return outputs


@last_block.register_fake
def _(
    x,
    norm_weight,
    norm_bias,
    weight,
    bias,
    target,
    with_grad,
    eps,
    slope,
    likelihood,
    activation,
    scale,
    pixel_low,
):
    return _outputs(x, weight, with_grad)


@torch.library.custom_op("bvae::last_block_backward", mutates_args=())
def last_block_backward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    unscaled_grad: Tensor,
    grad_sums: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_errors: Tensor,
    factor: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, norm_weight, norm_bias, weight and bias; those of vectors are float32."""
    saved = x, norm_weight, norm_bias, weight, unscaled_grad, grad_sums, mean, rstd
    launches, outputs = plan_backward(*saved, grad_errors, factor, slope)
    for each in launches:
        each.run(x.device)
    return outputs


@last_block_backward.register_fake
def _(x, norm_weight, norm_bias, weight, unscaled_grad, grad_sums, mean, rstd, grad_errors, factor, slope):
    return _grads(x, weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, norm_weight, norm_bias, weight, bias, _target, ctx.with_grad, _eps, ctx.slope, name, *_, scale, _ = (
        inputs
    )
    _errors, squares, unscaled_grad, grad_sums, mean, rstd, var = output
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, unscaled_grad, grad_sums, mean, rstd)
    ctx.factor, ctx.bias_dtype = likelihood.factor(name, scale), bias.dtype
    ctx.mark_non_differentiable(squares, unscaled_grad, grad_sums, mean, rstd, var)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_errors: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    check_single_backward("bvae::last_block")
    if grad_errors is None or not ctx.with_grad:
        return (None,) * 13
    saved = ctx.saved_tensors
    x, norm_weight, norm_bias, weight, bias = last_block_backward(*saved, grad_errors, ctx.factor, ctx.slope)
    of_norm = norm_weight.to(saved[1].dtype), norm_bias.to(saved[2].dtype)
    return x, *of_norm, weight, bias.to(ctx.bias_dtype), *[None] * 8


last_block.register_autograd(_differentiate, setup_context=_save)
