"""mu, log_var, seed -> z and the KL divergence per sample: one launch forward, one backward.

    z  = mu + exp(log_var / 2) * eps
    KL = 0.5 * (mu^2 + exp(log_var) - 1 - log_var)            summed over a sample

The noise eps comes from `noise`. The forward pass does not store it; the backward pass draws it again:

    d_mu      = d_z + d_KL * mu
    d_log_var = (std * (d_z * eps + d_KL * std) - d_KL) / 2     std = exp(log_var / 2); 0 at or past a bound

A sample is a row. Many short rows share a program. A long row is split among programs; the last one to finish
adds their partial sums in a fixed order, so equal inputs give equal bits.

A row is visited in its logical order, because that order numbers the noise. If it is also the order in
memory, loads and stores are 16 bytes wide. Latents in channels_last are loaded and stored one element at a
time: the same bytes in more instructions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bvae.kernels.completion_counters import completion_counters
from bvae.kernels.launch import Launch, check_single_backward, collapse, power_of_two
from bvae.kernels.noise import four_normals
from bvae.kernels.tile import last_to_arrive, offsets


@triton.jit
def _tile(row_block, column_block, batch, row_length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's rows `[ROWS, 1]` (int64: strides multiply them), columns `[1, COLUMNS]` and mask."""
    rows = (row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (column_block * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return rows, columns, (rows < batch) & (columns < row_length)


@triton.jit
def _noise(samples, column_block, seed, step, COLUMNS: tl.constexpr):
    """The tile's noise `[ROWS, COLUMNS]`: four neighbours share a Philox block."""
    groups = (column_block * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4))[None, :]
    n0, n1, n2, n3 = four_normals(groups, samples, seed, step)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _clamped(log_var, low, high):
    """`log_var` within [low, high]; NaN stays NaN, as with torch.clamp."""
    return tl.where(log_var < low, low, tl.where(log_var > high, high, log_var))


@triton.jit(
    do_not_specialize=["batch", "splits", "first_sample"]
)  # another batch size compiles only if the tile changes
def _forward_kernel(
    mu,  # [batch, row_length] in 1 + DIMS dimensions, as log_var and z
    log_var,
    z,  # None: the KL alone
    kl,  # [batch] float32
    kl_per_dim,  # [row_length] float32, or None
    key,  # [2] int64: seed and step as this launch read them, for the backward pass
    seed,  # 0-d int64
    step,  # 0-d int64, or None for 0
    first_sample,  # row 0's number, which keys its noise
    row_sums,  # [batch, splits] float32, or None if splits is 1
    column_sums,  # [row blocks, row_length] float32, or None
    counters,  # int32 zeros, one per row block, then one per column block; None if both sums are None
    batch,
    row_length,
    splits,  # programs per row block; more than 1 only if a row block is one row
    low,  # clamp's bounds
    high,
    sizes,
    mu_row_stride,
    mu_strides,
    log_var_row_stride,
    log_var_strides,
    z_row_stride,
    z_strides,
    DIMS: tl.constexpr,
    CLAMP: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,  # a power of two, at least splits
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,  # column_sums that are added at once
):
    row_block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    row_blocks = tl.cdiv(batch, ROWS)
    column_blocks = tl.cdiv(row_length, COLUMNS)
    if z is not None:
        seed_value = tl.load(seed)
        step_value = tl.full((), 0, tl.int64)
        if step is not None:
            step_value = tl.load(step)
        if tl.program_id(0) == 0:
            tl.store(key, seed_value)
            tl.store(key + 1, step_value)
    kl_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for column_block in range(split, column_blocks, splits):
        rows, columns, mask = _tile(row_block, column_block, batch, row_length, ROWS, COLUMNS)
        mu_ptrs = mu + rows * mu_row_stride + offsets(columns, sizes, mu_strides, DIMS)
        log_var_ptrs = log_var + rows * log_var_row_stride + offsets(columns, sizes, log_var_strides, DIMS)
        m = tl.load(mu_ptrs, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(log_var_ptrs, mask=mask, other=0.0).to(tl.float32)
        if CLAMP:
            v = _clamped(v, low, high)
        std = tl.exp(0.5 * v)
        if z is not None:
            eps = _noise(rows + first_sample, column_block, seed_value, step_value, COLUMNS)
            z_ptrs = z + rows * z_row_stride + offsets(columns, sizes, z_strides, DIMS)
            tl.store(z_ptrs, (m + std * eps).to(z.dtype.element_ty), mask=mask)
        kl_element = tl.where(mask, 0.5 * (m * m + std * std - 1 - v), 0.0)
        kl_sum += kl_element
        if kl_per_dim is not None:
            column = column_block * COLUMNS + tl.arange(0, COLUMNS)
            in_row = column < row_length
            sum_ptrs = column_sums + row_block.to(tl.int64) * row_length + column
            tl.store(sum_ptrs, tl.sum(kl_element, 0), mask=in_row)
            if last_to_arrive(counters + row_blocks + column_block, row_blocks):
                total = tl.zeros((PARTS, COLUMNS), tl.float32)
                for first in range(0, row_blocks, PARTS):
                    part = (first + tl.arange(0, PARTS))[:, None]
                    part_ptrs = column_sums + part.to(tl.int64) * row_length + column[None, :]
                    in_tile = (part < row_blocks) & in_row[None, :]
                    total += tl.load(part_ptrs, mask=in_tile, other=0.0, cache_modifier=".cg")
                tl.store(kl_per_dim + column, tl.sum(total, 0) / batch, mask=in_row)
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_sum = tl.sum(kl_sum, 1)
    if row_sums is None:
        tl.store(kl + row, row_sum, mask=row < batch)
    else:
        tl.store(row_sums + row * splits + split, row_sum)
        if last_to_arrive(counters + row_block, splits):
            part = tl.arange(0, SPLITS_PADDED)[None, :]
            part_ptrs = row_sums + row[:, None] * splits + part
            parts = tl.load(part_ptrs, mask=part < splits, other=0.0, cache_modifier=".cg")
            tl.store(kl + row, tl.sum(parts, 1))


@triton.jit(
    do_not_specialize=["batch", "first_sample"]
)  # another batch size compiles only if the tile changes
def _backward_kernel(
    mu,  # [batch, row_length] in 1 + DIMS dimensions, as log_var and the gradients of both and of z
    log_var,
    grad_z,  # or None
    grad_kl,  # [batch], or None
    grad_kl_per_dim,  # [row_length] in DIMS dimensions, or None
    grad_mu,
    grad_log_var,
    key,  # [2] int64: seed and step
    first_sample,
    batch,
    row_length,
    low,
    high,
    grad_kl_stride,
    sizes,
    mu_row_stride,
    mu_strides,
    log_var_row_stride,
    log_var_strides,
    grad_z_row_stride,
    grad_z_strides,
    grad_mu_row_stride,
    grad_mu_strides,
    grad_log_var_row_stride,
    grad_log_var_strides,
    grad_kl_per_dim_strides,
    DIMS: tl.constexpr,
    CLAMP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_blocks = tl.cdiv(row_length, COLUMNS)
    row_block = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    rows, columns, mask = _tile(row_block, column_block, batch, row_length, ROWS, COLUMNS)
    mu_ptrs = mu + rows * mu_row_stride + offsets(columns, sizes, mu_strides, DIMS)
    log_var_ptrs = log_var + rows * log_var_row_stride + offsets(columns, sizes, log_var_strides, DIMS)
    m = tl.load(mu_ptrs, mask=mask, other=0.0).to(tl.float32)
    raw = tl.load(log_var_ptrs, mask=mask, other=0.0).to(tl.float32)
    v = raw
    if CLAMP:
        v = _clamped(raw, low, high)
    std = tl.exp(0.5 * v)
    d_mu = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_kl = tl.zeros((ROWS, COLUMNS), tl.float32)  # of each element's KL
    d_std = tl.zeros((ROWS, COLUMNS), tl.float32)
    if grad_z is not None:
        grad_z_ptrs = grad_z + rows * grad_z_row_stride + offsets(columns, sizes, grad_z_strides, DIMS)
        d_z = tl.load(grad_z_ptrs, mask=mask, other=0.0).to(tl.float32)
        eps = _noise(rows + first_sample, column_block, tl.load(key), tl.load(key + 1), COLUMNS)
        d_mu += d_z
        d_std += d_z * eps
    if grad_kl is not None:
        d_kl += tl.load(grad_kl + rows * grad_kl_stride, mask=rows < batch, other=0.0).to(tl.float32)
    if grad_kl_per_dim is not None:
        d_dim_ptrs = grad_kl_per_dim + offsets(columns, sizes, grad_kl_per_dim_strides, DIMS)
        d_kl += tl.load(d_dim_ptrs, mask=columns < row_length, other=0.0).to(tl.float32) / batch
    d_mu += d_kl * m
    d_log_var = 0.5 * (std * (d_std + d_kl * std) - d_kl)
    if CLAMP:
        d_log_var = tl.where((raw > low) & (raw < high), d_log_var, 0.0)
    grad_mu_ptrs = grad_mu + rows * grad_mu_row_stride + offsets(columns, sizes, grad_mu_strides, DIMS)
    grad_log_var_ptrs = (
        grad_log_var + rows * grad_log_var_row_stride + offsets(columns, sizes, grad_log_var_strides, DIMS)
    )
    tl.store(grad_mu_ptrs, d_mu.to(grad_mu.dtype.element_ty), mask=mask)
    tl.store(grad_log_var_ptrs, d_log_var.to(grad_log_var.dtype.element_ty), mask=mask)


_PROGRAMS = 1024  # enough to fill the largest GPU; long rows are split up to this many


def _tile_size(batch: int, row_length: int, per_dim: bool = False) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps: 8 elements per thread, which is 16 bytes of bfloat16.

    One warp per tile until there are tiles for every SM, then four. With `per_dim` always one, because
    another program reads the tile's column sums, which are a block (see `last_to_arrive`).
    """
    size, warps = (1024, 4) if batch * row_length >= 2**19 and not per_dim else (256, 1)
    columns = min(power_of_two(max(row_length, 4)), size)  # 4: the normals of one Philox block
    return min(size // columns, power_of_two(batch)), columns, warps


def _layout(*tensors: Tensor, shared: Tensor | None = None) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """The kernel arguments that describe a row of `[B, ...]` tensors, and each tensor's strides within a row.

    A row keeps its logical order, which numbers the noise, in as few dimensions as all strides allow.
    `shared`, if given, has no batch dimension; its strides come last.
    """
    inner = [t.stride()[1:] for t in tensors] + ([] if shared is None else [shared.stride()])
    sizes, strides = collapse(tuple(tensors[0].shape[1:]), *inner)
    return {"sizes": sizes, "DIMS": len(sizes)}, strides


def _bounds(clamp: list[float] | None) -> dict[str, Any]:
    low, high = clamp or (0.0, 0.0)
    return {"low": low, "high": high, "CLAMP": clamp is not None}


def plan_forward(
    mu: Tensor,
    log_var: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    clamp: list[float] | None,
    per_dim: bool,
    first_sample: int = 0,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The forward launch, and the outputs it fills: z, kl, kl_per_dim and key; empty if not requested."""
    outputs = z, kl, kl_per_dim, key = _outputs(mu, seed, per_dim)
    batch, row_length = mu.shape[0], mu[0].numel()
    rows, columns, warps = _tile_size(batch, row_length, per_dim)
    row_blocks, column_blocks = triton.cdiv(batch, rows), triton.cdiv(row_length, columns)
    splits = min(column_blocks, max(1, _PROGRAMS // row_blocks))
    counter_count = row_blocks + (column_blocks if per_dim else 0) if splits > 1 or per_dim else 0
    sample = seed is not None
    layout, strides = _layout(mu, log_var, z if sample else mu)
    args = {
        "mu": mu,
        "log_var": log_var,
        "z": z if sample else None,
        "kl": kl,
        "kl_per_dim": kl_per_dim if per_dim else None,
        "key": key if sample else None,
        "seed": seed,
        "step": step,
        "first_sample": first_sample,
        "row_sums": kl.new_empty(batch, splits) if splits > 1 else None,
        "column_sums": kl.new_empty(row_blocks, row_length) if per_dim else None,
        "counters": completion_counters(counter_count, mu.device) if counter_count else None,
        "batch": batch,
        "row_length": row_length,
        "splits": splits,
        "mu_row_stride": mu.stride(0),
        "mu_strides": strides[0],
        "log_var_row_stride": log_var.stride(0),
        "log_var_strides": strides[1],
        "z_row_stride": z.stride(0),
        "z_strides": strides[2],
        "SPLITS_PADDED": min(power_of_two(column_blocks), _PROGRAMS),  # the same for every batch size
        "ROWS": rows,
        "COLUMNS": columns,
        "PARTS": max(1024 // columns, 1),
        **layout,
        **_bounds(clamp),
    }
    return Launch(_forward_kernel, row_blocks * splits, args, warps), outputs


def plan_backward(
    mu: Tensor,
    log_var: Tensor,
    key: Tensor,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    grad_kl_per_dim: Tensor | None,
    clamp: list[float] | None,
    first_sample: int = 0,
) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The backward launch and the outputs that it fills: the gradients of mu and log_var."""
    outputs = grad_mu, grad_log_var = torch.empty_like(mu), torch.empty_like(log_var)
    batch, row_length = mu.shape[0], mu[0].numel()
    rows, columns, warps = _tile_size(batch, row_length)
    grad_z_or_mu = mu if grad_z is None else grad_z
    shared = mu[0] if grad_kl_per_dim is None else grad_kl_per_dim
    layout, strides = _layout(mu, log_var, grad_z_or_mu, grad_mu, grad_log_var, shared=shared)
    args = {
        "mu": mu,
        "log_var": log_var,
        "grad_z": grad_z,
        "grad_kl": grad_kl,
        "grad_kl_per_dim": grad_kl_per_dim,
        "grad_mu": grad_mu,
        "grad_log_var": grad_log_var,
        "key": key,
        "first_sample": first_sample,
        "batch": batch,
        "row_length": row_length,
        "grad_kl_stride": 0 if grad_kl is None else grad_kl.stride(0),
        "mu_row_stride": mu.stride(0),
        "mu_strides": strides[0],
        "log_var_row_stride": log_var.stride(0),
        "log_var_strides": strides[1],
        "grad_z_row_stride": grad_z_or_mu.stride(0),
        "grad_z_strides": strides[2],
        "grad_mu_row_stride": grad_mu.stride(0),
        "grad_mu_strides": strides[3],
        "grad_log_var_row_stride": grad_log_var.stride(0),
        "grad_log_var_strides": strides[4],
        "grad_kl_per_dim_strides": strides[5],
        "ROWS": rows,
        "COLUMNS": columns,
        **layout,
        **_bounds(clamp),
    }
    programs = triton.cdiv(batch, rows) * triton.cdiv(row_length, columns)
    return Launch(_backward_kernel, programs, args, warps), outputs


def _outputs(mu: Tensor, seed: Tensor | None, per_dim: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unfilled z, kl, kl_per_dim and key; empty if not requested."""
    sample = seed is not None
    return (
        torch.empty_like(mu) if sample else mu.new_empty((0,) * mu.dim()),
        mu.new_empty(mu.shape[0], dtype=torch.float32),
        mu.new_empty(mu.shape[1:] if per_dim else 0, dtype=torch.float32),
        mu.new_empty(2 if sample else 0, dtype=torch.int64),
    )


@torch.library.custom_op("bvae::reparam_kl", mutates_args=())
def reparam_kl(
    mu: Tensor,
    log_var: Tensor,
    seed: Tensor | None,
    step: Tensor | None,
    clamp: list[float] | None,
    per_dim: bool,
    first_sample: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, kl, kl_per_dim and the (seed, step) of the noise; without a seed, z and the last are empty.

    The key is an output because the caller may advance its step before the backward pass reads it.
    """
    launch, outputs = plan_forward(mu, log_var, seed, step, clamp, per_dim, first_sample)
    launch.run(mu.device)
    return outputs


@reparam_kl.register_fake
def _(mu, log_var, seed, step, clamp, per_dim, first_sample=0):
    return _outputs(mu, seed, per_dim)


@torch.library.custom_op("bvae::reparam_kl_backward", mutates_args=())
def reparam_kl_backward(
    mu: Tensor,
    log_var: Tensor,
    key: Tensor,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    grad_kl_per_dim: Tensor | None,
    clamp: list[float] | None,
    first_sample: int = 0,
) -> tuple[Tensor, Tensor]:
    """The gradients of mu and log_var, each in its tensor's dtype."""
    launch, outputs = plan_backward(mu, log_var, key, grad_z, grad_kl, grad_kl_per_dim, clamp, first_sample)
    launch.run(mu.device)
    return outputs


@reparam_kl_backward.register_fake
def _(mu, log_var, key, grad_z, grad_kl, grad_kl_per_dim, clamp, first_sample=0):
    return torch.empty_like(mu), torch.empty_like(log_var)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mu, log_var, seed, _, clamp, per_dim, first_sample = inputs
    ctx.save_for_backward(mu, log_var, output[3])
    ctx.sample, ctx.clamp, ctx.per_dim, ctx.first_sample = seed is not None, clamp, per_dim, first_sample
    ctx.set_materialize_grads(False)  # no zeros are filled in for outputs that nobody used


def _differentiate(
    ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None, grad_kl_per_dim: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    check_single_backward("bvae::reparam_kl")
    grads = reparam_kl_backward(
        *ctx.saved_tensors,
        grad_z if ctx.sample else None,
        grad_kl,
        grad_kl_per_dim if ctx.per_dim else None,
        ctx.clamp,
        ctx.first_sample,
    )
    return *grads, None, None, None, None, None


reparam_kl.register_autograd(_differentiate, setup_context=_save)
