"""Standard normal noise as a pure function of (seed, step, sample, element): Philox 4x32-10 and Box-Muller.

Philox is the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011). Element `j` of sample `b` takes word `j % 4` of the block with

    key     = (low, high) 32 bits of seed
    counter = (j // 4, b, low 32 bits of step, high 32 bits of step)

so the noise depends on logical indices alone: not on strides, block sizes, devices, dtypes or the number of
samples in the batch. `j` counts the elements of one sample in row-major order.

Every function exists twice, for torch and for Triton, with the same arithmetic line by line: integers, then
float32 multiplications and additions, and one square root. Logarithm, cosine and sine are polynomials, so no
library function is used for them. The integers are equal. The normals are equal to 2 ulp, but not bit by bit:
the kernels' square root is exactly rounded, torch's on a CPU is not.
"""

import math

import torch
from torch import Tensor

from bvae.kernels.launch import AVAILABLE

if AVAILABLE:
    import triton
    import triton.language as tl

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9  # added to the key after every round: the golden ratio, and sqrt(3) - 1, of 2**32
_WEYL_1 = 0xBB67AE85
_UNIT = 2.0**-32  # of a word, in [0, 1)
_TURN = 2 * math.pi * _UNIT  # of a word, in radians

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four pseudo-random 32-bit words per counter.

    All tensors are int64 with values in [0, 2**32), of shapes that broadcast together.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0  # wraps in int64; the shift's sign bits are masked off
        product_1 = c2 * _MULTIPLIER_1
        c0 = ((product_1 >> 32) & _MASK) ^ c1 ^ k0
        c1 = product_1 & _MASK
        c2 = ((product_0 >> 32) & _MASK) ^ c3 ^ k1
        c3 = product_0 & _MASK
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def _log(u: Tensor) -> Tensor:
    """log u for u in [2**-33, 1], float32, to 3 ulp.

    u = 2**exponent * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and log(1 + f) = f - f^2/2 + f^3 p(f), where
    p is a least-squares fit in Chebyshev nodes, 8e-9 off.
    """
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # the bits of sqrt(1/2)
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    p = 0.126542365 + f * -0.0758391588
    p = 0.142148746 + f * (-0.131244298 + f * p)
    p = 0.200008561 + f * (-0.166290553 + f * p)
    p = 0.333333322 + f * (-0.250006239 + f * p)
    return exponent * 0.693147181 + (f + f * f * (-0.5 + f * p))


def normal_pair(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals (float32) from two 32-bit words: Box and Muller (1958).

    The radius is sqrt(-2 log u) with u in [2**-33, 1], at most 6.77. The angle's word is split into the
    nearest quarter turn and a rest within an eighth of a turn, where Taylor's series to x**10 are exact to
    float32.
    """
    u = radius.float() * _UNIT + _UNIT / 2
    r = torch.sqrt(-2.0 * _log(u))
    quarter = ((angle + 0x20000000) >> 30) & 3
    rest = (((angle + 0x20000000) & 0x3FFFFFFF) - 0x20000000).float()
    x = rest * _TURN
    x2 = x * x
    cos = 1 + x2 * (-1 / 2 + x2 * (1 / 24 + x2 * (-1 / 720 + x2 * (1 / 40320 + x2 * (-1 / 3628800)))))
    sin = x * (1 + x2 * (-1 / 6 + x2 * (1 / 120 + x2 * (-1 / 5040 + x2 * (1 / 362880)))))
    odd = (quarter & 1) == 1
    first = torch.where(odd, sin, cos)
    second = torch.where(odd, cos, sin)
    first = torch.where((quarter == 1) | (quarter == 2), -first, first)
    second = torch.where(quarter >= 2, -second, second)
    return r * first, r * second


def normal(
    shape: torch.Size | tuple[int, ...], seed: Tensor, step: Tensor | None = None, first_sample: int = 0
) -> Tensor:
    """Standard normal noise of `shape` `[B, ...]`, float32, on the seed's device.

    `seed` and `step` are 0-d int64 tensors; None is step 0. The first sample has the number `first_sample`.
    """
    samples, elements = shape[0], math.prod(shape[1:])
    if step is None:
        step = torch.zeros_like(seed)
    group = torch.arange((elements + 3) // 4, device=seed.device)[None, :]
    sample = torch.arange(first_sample, first_sample + samples, device=seed.device)[:, None]
    counter = (group, sample, step & _MASK, (step >> 32) & _MASK)
    w0, w1, w2, w3 = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    pairs = normal_pair(torch.stack((w0, w2), dim=-1), torch.stack((w1, w3), dim=-1))
    noise = torch.stack(pairs, dim=-1)
    return noise.flatten(1)[:, :elements].reshape(shape)


if AVAILABLE:
    # the constants above, in the form that a kernel may read
    ROUNDS = tl.constexpr(_ROUNDS)
    MULTIPLIER_0 = tl.constexpr(_MULTIPLIER_0)
    MULTIPLIER_1 = tl.constexpr(_MULTIPLIER_1)
    WEYL_0 = tl.constexpr(_WEYL_0)
    WEYL_1 = tl.constexpr(_WEYL_1)
    UNIT = tl.constexpr(_UNIT)
    TURN = tl.constexpr(_TURN)

    @triton.jit
    def philox_words(c0, c1, c2, c3, k0, k1):
        """`philox` on uint32 blocks."""
        for _ in tl.static_range(ROUNDS):
            high_0 = tl.umulhi(c0, MULTIPLIER_0)
            high_1 = tl.umulhi(c2, MULTIPLIER_1)
            low_0 = c0 * MULTIPLIER_0
            low_1 = c2 * MULTIPLIER_1
            c0 = high_1 ^ c1 ^ k0
            c1 = low_1
            c2 = high_0 ^ c3 ^ k1
            c3 = low_0
            k0 = k0 + WEYL_0
            k1 = k1 + WEYL_1
        return c0, c1, c2, c3

    @triton.jit
    def log_of_uniform(u):
        """`_log` on float32 blocks."""
        bits = u.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) >> 23
        f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
        p = 0.126542365 + f * -0.0758391588
        p = 0.142148746 + f * (-0.131244298 + f * p)
        p = 0.200008561 + f * (-0.166290553 + f * p)
        p = 0.333333322 + f * (-0.250006239 + f * p)
        return exponent.to(tl.float32) * 0.693147181 + (f + f * f * (-0.5 + f * p))

    @triton.jit
    def normals_of_words(radius, angle):
        """`normal_pair` on uint32 blocks."""
        u = radius.to(tl.float32) * UNIT + UNIT / 2
        r = tl.sqrt_rn(-2.0 * log_of_uniform(u))
        turned = angle + 0x20000000
        quarter = turned >> 30
        rest = ((turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32)
        x = rest * TURN
        x2 = x * x
        cos = 1.0 + x2 * (-1 / 2 + x2 * (1 / 24 + x2 * (-1 / 720 + x2 * (1 / 40320 + x2 * (-1 / 3628800)))))
        sin = x * (1.0 + x2 * (-1 / 6 + x2 * (1 / 120 + x2 * (-1 / 5040 + x2 * (1 / 362880)))))
        odd = (quarter & 1) == 1
        first = tl.where(odd, sin, cos)
        second = tl.where(odd, cos, sin)
        first = tl.where((quarter == 1) | (quarter == 2), -first, first)
        second = tl.where(quarter >= 2, -second, second)
        return r * first, r * second

    @triton.jit
    def four_normals(group, sample, seed, step):
        """The normals 4 * group to 4 * group + 3 of each sample, as four blocks.

        `group` and `sample` are int32 or int64 blocks that broadcast together; seed and step int64 scalars.
        """
        zero = (group + sample).to(tl.uint32) * 0  # gives every word the blocks' common shape
        c0 = group.to(tl.uint32) + zero
        c1 = sample.to(tl.uint32) + zero
        c2 = (step & 0xFFFFFFFF).to(tl.uint32) + zero
        c3 = ((step >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero
        k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
        k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
        w0, w1, w2, w3 = philox_words(c0, c1, c2, c3, k0, k1)
        n0, n1 = normals_of_words(w0, w1)
        n2, n3 = normals_of_words(w2, w3)
        return n0, n1, n2, n3
