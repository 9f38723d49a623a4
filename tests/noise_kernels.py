"""The device half of bvae.kernels.noise as kernels; conftest imports them, to be compiled or interpreted."""

from functools import cache

import numpy
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from bvae.kernels.noise import normals_of_words, philox_words


@triton.jit
def philox_kernel(words, key, n, BLOCK: tl.constexpr):
    """Replace each counter, a column of `words` `[4, n]` uint32, by its Philox block; `key` `[2, n]`."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    c0 = tl.load(words + i, mask=mask)
    c1 = tl.load(words + n + i, mask=mask)
    c2 = tl.load(words + 2 * n + i, mask=mask)
    c3 = tl.load(words + 3 * n + i, mask=mask)
    k0 = tl.load(key + i, mask=mask)
    k1 = tl.load(key + n + i, mask=mask)
    c0, c1, c2, c3 = philox_words(c0, c1, c2, c3, k0, k1)
    tl.store(words + i, c0, mask=mask)
    tl.store(words + n + i, c1, mask=mask)
    tl.store(words + 2 * n + i, c2, mask=mask)
    tl.store(words + 3 * n + i, c3, mask=mask)


@triton.jit
def normal_kernel(words, normals, n, BLOCK: tl.constexpr):
    """Two normals `[2, n]` float32 from the words `[2, n]` uint32."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    first, second = normals_of_words(tl.load(words + i, mask=mask), tl.load(words + n + i, mask=mask))
    tl.store(normals + i, first, mask=mask)
    tl.store(normals + n + i, second, mask=mask)


@triton.jit
def count_kernel(total, n):
    """The sum of 0 to n - 1: a loop asks a tensor for its value as an int."""
    for i in range(n):
        tl.store(total, tl.load(total) + i)


@cache
def interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot be used here; None if it can.

    NumPy 2.4 takes no array of one element for a number, which the interpreter of triton 3.6 relies on.
    """
    total = torch.zeros(1, dtype=torch.int64)
    try:
        count_kernel[(1,)](total, 3)
    except InterpreterError as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        return f"the interpreter of triton {triton.__version__} fails with numpy {numpy.__version__}: {error}"
    assert total.item() == 3
    return None
