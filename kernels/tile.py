"""What the kernels share on the device: addresses of positions, and which program finishes last."""

import triton
import triton.language as tl


@triton.jit
def offsets(index, sizes, strides, DIMS: tl.constexpr):
    """The int64 offsets of positions `index` in dimensions of `sizes`; the last varies fastest."""
    rest = index
    offsets = tl.zeros_like(index).to(tl.int64)
    for d in tl.static_range(DIMS - 1, 0, -1):
        offsets += (rest % sizes[d]).to(tl.int64) * strides[d]
        rest = rest // sizes[d]
    return offsets + rest.to(tl.int64) * strides[0]


@triton.jit
def last_to_arrive(counter, arrivals):
    """Whether this program is the last of `arrivals` at `counter`, whose stores it can then read.

    The barriers order this program's stores before the release, and its loads after the acquire. On NVIDIA
    this holds for all stores. AMD's barrier does not wait for stores in flight, so there it holds only for
    the stores of the first warp, which performs the atomic. Therefore a program of several warps may pass on
    a scalar that it stored; only a program of one warp may pass on a block. The last one resets the counter.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == arrivals - 1
    tl.debug_barrier()
    if last:
        tl.store(counter, 0)
    return last
