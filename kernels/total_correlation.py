"""z, mu, log_var -> log q(z) and sum_d log q(z_d), without a `[B, B, D]` tensor: 1 launch forward, 2 back.

    S_ij  = sum_d l_ijd,   l_ijd = log N(z_id; mu_jd, sigma_jd)
    joint[i]        = log sum_j exp(w_ij + S_ij)                      w_ij: own if i = j, else other
    marginals[i, d] = log sum_j exp(w_ij + l_ijd)                     product[i] = sum_d marginals[i, d]

With G_ijd = g_joint[i] exp(w_ij + S_ij - joint[i]) + g_product[i] exp(w_ij + l_ijd - marginals[i, d]):

    d_z[i]       = -sum_j G_ijd (z_id - mu_jd) / sigma_jd^2
    d_mu[j]      =  sum_i G_ijd (z_id - mu_jd) / sigma_jd^2
    d_log_var[j] =  sum_i G_ijd ((z_id - mu_jd)^2 / sigma_jd^2 - 1) / 2

A program owns some rows and visits the others tile by tile. It owns samples in the forward pass, with the
largest exponent so far and the sum relative to it, and for d_z; for d_mu and d_log_var it owns posteriors. So
nothing is added by atomics, and equal inputs give equal bits. Exponents are in log2 units. All three kernels
compute S by `_log2_density` without fused multiply-adds: at |S| near 500 another rounding would change
exp(S - joint) by 2e-5.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvae.kernels.launch import Launch, check_single_backward, power_of_two

MOST_LATENTS = 512  # of which a row fits in a tile

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_HALF_LOG2_2PI = tl.constexpr(1.3257480647361595)


@triton.jit
def _rows(tensor, row, column, row_stride, column_stride, mask):
    """A tile of a tensor, float32."""
    ptrs = tensor + row.to(tl.int64)[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _log2_density(z, mu, log_var, in_row):
    """log2 N(z; mu, exp(log_var)) and z - mu, both `[I, J, D]`, 0 outside a row; and 1 / sigma^2 `[J, D]`."""
    log2_var = log_var * _LOG2_E
    precision = tl.exp2(-log2_var)
    height = tl.where(in_row[None, :], log2_var * -0.5 - _HALF_LOG2_2PI, 0.0)
    distance = z[:, None, :] - mu[None, :, :]
    density = height[None, :, :] - distance * distance * (precision * (0.5 * _LOG2_E))[None, :, :]
    return density, distance, precision


@triton.jit
def _log2_weight(i, j, batch, own, other):
    """w_ij in log2 units `[I, J]`; minus infinity outside the batch."""
    weight = tl.where(i[:, None] == j[None, :], own, other)
    return tl.where((i < batch)[:, None] & (j < batch)[None, :], weight, float("-inf"))


@triton.jit
def _finite(maximum):
    """What to subtract from exponents whose maximum this is: not infinity from infinity."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit(do_not_specialize=["batch"])  # another batch size compiles nothing
def _forward_kernel(
    z,  # [batch, latents], as mu and log_var
    mu,
    log_var,
    joint,  # [batch] float32, nats
    product,  # [batch] float32, nats
    log2_joint,  # [batch] float32, for the backward pass: converted from nats it would lose its last bits
    log2_marginals,  # [batch, latents] float32
    batch,
    latents,
    own,  # log2 of the weights
    other,
    z_row_stride,
    z_column_stride,
    mu_row_stride,
    mu_column_stride,
    log_var_row_stride,
    log_var_column_stride,
    OWNED: tl.constexpr,
    ROWS: tl.constexpr,  # visited at once
    COLUMNS: tl.constexpr,
):
    i = tl.program_id(0) * OWNED + tl.arange(0, OWNED)
    column = tl.arange(0, COLUMNS)
    in_row = column < latents
    mask = (i < batch)[:, None] & in_row[None, :]
    z_tile = _rows(z, i, column, z_row_stride, z_column_stride, mask)
    marginal_max = tl.full((OWNED, COLUMNS), float("-inf"), tl.float32)
    marginal_sum = tl.zeros((OWNED, COLUMNS), tl.float32)
    joint_max = tl.full((OWNED,), float("-inf"), tl.float32)
    joint_sum = tl.zeros((OWNED,), tl.float32)
    for first in range(0, batch, ROWS):
        j = first + tl.arange(0, ROWS)
        visited = (j < batch)[:, None] & in_row[None, :]
        m = _rows(mu, j, column, mu_row_stride, mu_column_stride, visited)
        v = _rows(log_var, j, column, log_var_row_stride, log_var_column_stride, visited)
        density, _, _ = _log2_density(z_tile, m, v, in_row)
        weight = _log2_weight(i, j, batch, own, other)
        whole = tl.sum(density, 2) + weight
        density += weight[:, :, None]

        new_max = tl.maximum(marginal_max, tl.max(density, 1))
        base = _finite(new_max)
        added = tl.sum(tl.exp2(density - base[:, None, :]), 1)
        marginal_sum = marginal_sum * tl.exp2(marginal_max - base) + added
        marginal_max = new_max

        new_whole = tl.maximum(joint_max, tl.max(whole, 1))
        base_whole = _finite(new_whole)
        joint_sum = joint_sum * tl.exp2(joint_max - base_whole) + tl.sum(
            tl.exp2(whole - base_whole[:, None]), 1
        )
        joint_max = new_whole
    marginal = _finite(marginal_max) + tl.log2(marginal_sum)
    whole = _finite(joint_max) + tl.log2(joint_sum)
    row = i.to(tl.int64)
    tl.store(log2_marginals + row[:, None] * latents + column[None, :], marginal, mask=mask)
    tl.store(log2_joint + row, whole, mask=i < batch)
    tl.store(joint + row, whole * _LN_2, mask=i < batch)
    tl.store(product + row, tl.sum(tl.where(in_row[None, :], marginal, 0.0), 1) * _LN_2, mask=i < batch)


@triton.jit
def _shares(
    density,
    i,
    j,
    batch,
    latents,
    own,
    other,
    column,
    in_row,
    log2_joint,
    log2_marginals,
    grad_joint,
    grad_product,
    grad_joint_stride,
    grad_product_stride,
):
    """G `[I, J, D]` of samples i and posteriors j, from their `_log2_density`."""
    in_batch = i < batch
    row = i.to(tl.int64)
    by_joint = tl.load(grad_joint + row * grad_joint_stride, mask=in_batch, other=0.0)
    by_product = tl.load(grad_product + row * grad_product_stride, mask=in_batch, other=0.0)
    joint = tl.load(log2_joint + row, mask=in_batch, other=0.0)
    mask = in_batch[:, None] & in_row[None, :]
    marginal = tl.load(log2_marginals + row[:, None] * latents + column[None, :], mask=mask, other=0.0)
    weight = _log2_weight(i, j, batch, own, other)
    whole = by_joint[:, None] * tl.exp2(tl.sum(density, 2) + weight - joint[:, None])
    each = tl.exp2(density + weight[:, :, None] - marginal[:, None, :])
    return whole[:, :, None] + by_product[:, None, None] * each


@triton.jit(do_not_specialize=["batch"])
def _samples_kernel(
    z,
    mu,
    log_var,
    log2_joint,
    log2_marginals,
    grad_joint,  # [batch]
    grad_product,  # [batch]
    grad_z,
    batch,
    latents,
    own,
    other,
    z_row_stride,
    z_column_stride,
    mu_row_stride,
    mu_column_stride,
    log_var_row_stride,
    log_var_column_stride,
    grad_joint_stride,
    grad_product_stride,
    grad_z_row_stride,
    grad_z_column_stride,
    OWNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i = tl.program_id(0) * OWNED + tl.arange(0, OWNED)
    column = tl.arange(0, COLUMNS)
    in_row = column < latents
    mask = (i < batch)[:, None] & in_row[None, :]
    z_tile = _rows(z, i, column, z_row_stride, z_column_stride, mask)
    total = tl.zeros((OWNED, COLUMNS), tl.float32)
    for first in range(0, batch, ROWS):
        j = first + tl.arange(0, ROWS)
        visited = (j < batch)[:, None] & in_row[None, :]
        m = _rows(mu, j, column, mu_row_stride, mu_column_stride, visited)
        v = _rows(log_var, j, column, log_var_row_stride, log_var_column_stride, visited)
        density, distance, precision = _log2_density(z_tile, m, v, in_row)
        shares = _shares(
            density,
            i,
            j,
            batch,
            latents,
            own,
            other,
            column,
            in_row,
            log2_joint,
            log2_marginals,
            grad_joint,
            grad_product,
            grad_joint_stride,
            grad_product_stride,
        )
        total -= tl.sum(shares * distance * precision[None, :, :], 1)
    ptrs = grad_z + i.to(tl.int64)[:, None] * grad_z_row_stride + column[None, :] * grad_z_column_stride
    tl.store(ptrs, total.to(grad_z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch"])
def _posteriors_kernel(
    z,
    mu,
    log_var,
    log2_joint,
    log2_marginals,
    grad_joint,  # [batch]
    grad_product,  # [batch]
    grad_mu,
    grad_log_var,
    batch,
    latents,
    own,
    other,
    z_row_stride,
    z_column_stride,
    mu_row_stride,
    mu_column_stride,
    log_var_row_stride,
    log_var_column_stride,
    grad_joint_stride,
    grad_product_stride,
    grad_mu_row_stride,
    grad_mu_column_stride,
    grad_log_var_row_stride,
    grad_log_var_column_stride,
    OWNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    j = tl.program_id(0) * OWNED + tl.arange(0, OWNED)
    column = tl.arange(0, COLUMNS)
    in_row = column < latents
    mask = (j < batch)[:, None] & in_row[None, :]
    m = _rows(mu, j, column, mu_row_stride, mu_column_stride, mask)
    v = _rows(log_var, j, column, log_var_row_stride, log_var_column_stride, mask)
    by_mu = tl.zeros((OWNED, COLUMNS), tl.float32)
    by_log_var = tl.zeros((OWNED, COLUMNS), tl.float32)
    for first in range(0, batch, ROWS):
        i = first + tl.arange(0, ROWS)
        visited = (i < batch)[:, None] & in_row[None, :]
        z_tile = _rows(z, i, column, z_row_stride, z_column_stride, visited)
        density, distance, precision = _log2_density(z_tile, m, v, in_row)
        shares = _shares(
            density,
            i,
            j,
            batch,
            latents,
            own,
            other,
            column,
            in_row,
            log2_joint,
            log2_marginals,
            grad_joint,
            grad_product,
            grad_joint_stride,
            grad_product_stride,
        )
        slope = shares * distance * precision[None, :, :]
        by_mu += tl.sum(slope, 0)
        by_log_var += tl.sum(slope * distance - shares, 0)
    row = j.to(tl.int64)[:, None]
    mu_ptrs = grad_mu + row * grad_mu_row_stride + column[None, :] * grad_mu_column_stride
    tl.store(mu_ptrs, by_mu.to(grad_mu.dtype.element_ty), mask=mask)
    ptrs = grad_log_var + row * grad_log_var_row_stride + column[None, :] * grad_log_var_column_stride
    tl.store(ptrs, (0.5 * by_log_var).to(grad_log_var.dtype.element_ty), mask=mask)


_TILE = 4096  # densities at once: 16 per thread of 8 warps


def _tile_size(latents: int) -> tuple[int, int, int, int]:
    """Rows that a program owns, rows that it visits at once, columns of a tile, warps."""
    columns = max(power_of_two(latents), 16)
    owned = 4 if columns <= 128 else 2
    visited = min(_TILE // (columns * owned), 16)
    return owned, visited, columns, max(owned * visited * columns // 512, 1)


def _strides(**tensors: Tensor) -> dict[str, int]:
    rows = {f"{name}_row_stride": tensor.stride(0) for name, tensor in tensors.items()}
    return rows | {f"{name}_column_stride": tensor.stride(1) for name, tensor in tensors.items()}


def _arguments(z: Tensor, own: float, other: float) -> tuple[dict[str, Any], int, int]:
    """The arguments that all kernels have, the number of programs and the warps of each."""
    batch, latents = z.shape
    owned, visited, columns, warps = _tile_size(latents)
    log2_e = _LOG2_E.value
    args = {"batch": batch, "latents": latents, "own": own * log2_e, "other": other * log2_e}
    return {**args, "OWNED": owned, "ROWS": visited, "COLUMNS": columns}, triton.cdiv(batch, owned), warps


def _outputs(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unfilled joint, product, log2_joint and log2_marginals."""
    batch, latents = z.shape
    joint, product, log2_joint = (z.new_empty(batch, dtype=torch.float32) for _ in range(3))
    return joint, product, log2_joint, z.new_empty((batch, latents), dtype=torch.float32)


def plan_forward(
    z: Tensor, mu: Tensor, log_var: Tensor, own: float, other: float
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The forward launch, and the outputs it fills: joint, product, log2_joint and log2_marginals."""
    outputs = joint, product, log2_joint, log2_marginals = _outputs(z)
    common, programs, warps = _arguments(z, own, other)
    args = {
        "z": z,
        "mu": mu,
        "log_var": log_var,
        "joint": joint,
        "product": product,
        "log2_joint": log2_joint,
        "log2_marginals": log2_marginals,
        **common,
        **_strides(z=z, mu=mu, log_var=log_var),
    }
    return Launch(_forward_kernel, programs, args, warps), outputs


def plan_backward(
    z: Tensor,
    mu: Tensor,
    log_var: Tensor,
    log2_joint: Tensor,
    log2_marginals: Tensor,
    grad_joint: Tensor,
    grad_product: Tensor,
    own: float,
    other: float,
) -> tuple[tuple[Launch, Launch], tuple[Tensor, Tensor, Tensor]]:
    """The backward launches, of the samples and of the posteriors, and the gradients that they fill."""
    grads = grad_z, grad_mu, grad_log_var = (
        torch.empty_like(z),
        torch.empty_like(mu),
        torch.empty_like(log_var),
    )
    common, programs, warps = _arguments(z, own, other)
    args = {
        "z": z,
        "mu": mu,
        "log_var": log_var,
        "log2_joint": log2_joint,
        "log2_marginals": log2_marginals,
        "grad_joint": grad_joint,
        "grad_product": grad_product,
        "grad_joint_stride": grad_joint.stride(0),
        "grad_product_stride": grad_product.stride(0),
        **common,
        **_strides(z=z, mu=mu, log_var=log_var),
    }
    by_posteriors = {"grad_mu": grad_mu, "grad_log_var": grad_log_var}
    of_samples = {**args, "grad_z": grad_z, **_strides(grad_z=grad_z)}
    of_posteriors = {**args, **by_posteriors, **_strides(**by_posteriors)}
    launches = (
        Launch(_samples_kernel, programs, of_samples, warps),
        Launch(_posteriors_kernel, programs, of_posteriors, warps),
    )
    return launches, grads


@torch.library.custom_op("bvae::log_aggregate_posterior", mutates_args=())
def log_aggregate_posterior(
    z: Tensor, mu: Tensor, log_var: Tensor, own: float, other: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """joint and product `[B]`, nats, and what the backward pass needs; of z, mu, log_var `[B, D]`.

    own, other: the logarithms of the weights, nats.
    """
    launch, outputs = plan_forward(z, mu, log_var, own, other)
    launch.run(z.device)
    return outputs


@log_aggregate_posterior.register_fake
def _(z, mu, log_var, own, other):
    return _outputs(z)


@torch.library.custom_op("bvae::log_aggregate_posterior_backward", mutates_args=())
def log_aggregate_posterior_backward(
    z: Tensor,
    mu: Tensor,
    log_var: Tensor,
    log2_joint: Tensor,
    log2_marginals: Tensor,
    grad_joint: Tensor,
    grad_product: Tensor,
    own: float,
    other: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of z, mu and log_var, each in its tensor's dtype."""
    saved = z, mu, log_var, log2_joint, log2_marginals
    launches, grads = plan_backward(*saved, grad_joint, grad_product, own, other)
    for launch in launches:
        launch.run(z.device)
    return grads


@log_aggregate_posterior_backward.register_fake
def _(z, mu, log_var, log2_joint, log2_marginals, grad_joint, grad_product, own, other):
    return torch.empty_like(z), torch.empty_like(mu), torch.empty_like(log_var)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, mu, log_var, ctx.own, ctx.other = inputs
    ctx.save_for_backward(z, mu, log_var, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(
    ctx: Any, grad_joint: Tensor, grad_product: Tensor, _: Tensor, __: Tensor
) -> tuple[Tensor | None, ...]:
    check_single_backward("bvae::log_aggregate_posterior")
    grads = log_aggregate_posterior_backward(*ctx.saved_tensors, grad_joint, grad_product, ctx.own, ctx.other)
    return *grads, None, None


log_aggregate_posterior.register_autograd(_differentiate, setup_context=_save)
