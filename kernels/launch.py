"""Launch a kernel: choose the backend, describe tensors in the fewest dimensions, set the device."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    import triton  # noqa: F401

    AVAILABLE = True
except ImportError:  # no build for this platform, or a broken one: the reference runs
    AVAILABLE = False

ON_AMD = torch.version.hip is not None  # there only a program of one warp may announce a block: see tile.py
ENABLED = True  # False: always the reference, for debugging and to measure the kernels' gain
NETWORK = False  # True: the layers of PyTorch-VAE's network use `batch_norm` too, where it can take them


def runs_triton(*tensors: Tensor) -> bool:
    """Whether an operation on `tensors` goes to the Triton kernels, not to the reference.

    It does on CUDA and ROCm, and on a CPU in Triton's interpreter: TRITON_INTERPRET=1, set before the kernels
    are imported. The reference runs if `ENABLED` is false, if a tensor is float64 (the kernels compute in
    float32), if a tensor is empty (a grid cannot be empty), and inside `torch.func`'s transforms and
    forward-mode AD, for which a kernel has no rule: its tangents would be zero.
    """
    kind = tensors[0].device.type
    on_device = os.environ.get("TRITON_INTERPRET") == "1" if kind == "cpu" else kind == "cuda"
    return on_device and AVAILABLE and _suit_kernels(tensors)


def runs_closed_form(*tensors: Tensor) -> bool:
    """Whether an operation on `tensors` goes to `kernels/cpu`, whose gradients are written by hand.

    It does in eager mode on a CPU, for what the Triton kernels would take on a GPU: autograd's gradients need
    more passes. A compiler fuses the reference's operations better than these.
    """
    return tensors[0].device.type == "cpu" and not torch.compiler.is_compiling() and _suit_kernels(tensors)


def _suit_kernels(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels, of any backend, are wanted and can take the tensors here."""
    if not ENABLED or is_transformed():
        return False
    return not any(t.dtype == torch.float64 or t.numel() == 0 for t in tensors)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode AD is active."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def check_single_backward(op: str) -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated again (`create_graph=True`).

    A kernel's gradient carries no graph: what follows from it would be missing without a word.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} has no second derivative on the Triton kernels (create_graph=True): use torch.func.grad, "
            "or set bvae.kernels.launch.ENABLED = False before the forward pass: plain PyTorch then runs"
        )


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as data: `run` performs it on a device; a compiler can examine it without one.

    `fuse` lets the compiler round a product and a sum once instead of twice. It is off for the noise, which
    must equal the torch functions' noise up to the last bits with every Triton release.
    """

    kernel: Any
    programs: int
    args: dict[str, Any]
    num_warps: int
    fuse: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "enable_fp_fusion": self.fuse}

    def run(self, device: torch.device) -> None:
        guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with guard:
            self.kernel[(self.programs,)](**self.args, **self.options)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def collapse(
    sizes: tuple[int, ...], *strides: tuple[int, ...]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The fewest dimensions that visit the same elements in the same order, for several tensors at once.

    Neighbours that are contiguous in every tensor become one; sizes of 1 are dropped; one dimension stays.
    """
    merged = [(1, (0,) * len(strides))]
    for size, steps in zip(sizes, zip(*strides, strict=True), strict=True):
        outer_size, outer_steps = merged[-1]
        if size == 1:
            continue
        if outer_size == 1:
            merged[-1] = (size, steps)
        elif all(outer == step * size for outer, step in zip(outer_steps, steps, strict=True)):
            merged[-1] = (outer_size * size, steps)
        else:
            merged.append((size, steps))
    return tuple(size for size, _ in merged), list(zip(*(steps for _, steps in merged), strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill their memory without a gap, in any order of dimensions."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dense = tensor.permute(order)
    return dense.numel() < 2 or collapse(tuple(dense.shape), dense.stride())[1] == [(1,)]
