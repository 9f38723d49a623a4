"""Repairs of Triton's interpreter, which keeps bfloat16 as uint16, for the tests of kernels in bfloat16."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

UNPATCHED = {name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_dot")}


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16's bits, to nearest and even, as a GPU does."""
    return torch.from_numpy(np.array(values)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def _widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16's bits to float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
    kinds = src.dtype.scalar, dst_type.scalar
    if kinds == (tl.float32, tl.bfloat16):
        return TensorHandle(_rounded(src.data), tl.bfloat16)
    if kinds == (tl.bfloat16, tl.float32):  # the interpreter's own is right, and slow
        return TensorHandle(_widened(src.data), tl.float32)
    return UNPATCHED["cast_impl"](self, src, dst_type)


def _create_dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any
) -> TensorHandle:
    if a.dtype.scalar == tl.bfloat16:
        a, b = (TensorHandle(_widened(factor.data), tl.float32) for factor in (a, b))
    return UNPATCHED["create_dot"](self, a, b, d, *rest)


def repair() -> None:
    """Round float32 to bfloat16 to nearest and even, and multiply the numbers of bfloat16 matrices.

    triton 3.8 truncates, and multiplies the bits as integers; `test_interpreter` fails once it does not.
    """
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_dot = _create_dot
