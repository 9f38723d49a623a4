"""Where a kernel runs and how it is launched: backend, layout, block sizes, device guard, tickets."""

import importlib.util
import os
import threading
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

AVAILABLE = importlib.util.find_spec("triton") is not None


def runs_triton(*tensors: Tensor) -> bool:
    """Whether an operation on `tensors` goes to the Triton kernels, not to the reference.

    It does on CUDA and ROCm, and on a CPU in Triton's interpreter: TRITON_INTERPRET=1, set before the kernels
    are imported. Where a tensor is float64 or empty it does not: the kernels compute in float32, and no grid
    is empty.
    """
    if not AVAILABLE or any(t.dtype == torch.float64 or t.numel() == 0 for t in tensors):
        return False
    if tensors[0].device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return tensors[0].device.type == "cuda"


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as data: what `run` does on a device, a compiler can look at without one.

    Floating-point contraction is off, so that a kernel rounds where the reference rounds, with every Triton
    release; the kernels wait for memory, and a few more instructions cost them nothing.
    """

    kernel: Any
    programs: int
    args: dict[str, Any]
    num_warps: int

    OPTIONS: ClassVar[dict[str, Any]] = {"enable_fp_fusion": False}

    def run(self, device: torch.device) -> None:
        guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with guard:
            self.kernel[(self.programs,)](**self.args, num_warps=self.num_warps, **self.OPTIONS)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def collapse(
    sizes: tuple[int, ...], *strides: tuple[int, ...]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The fewest dimensions that visit the same elements in the same order, for several tensors at once.

    Neighbours that are contiguous in every tensor become one; sizes of 1 go. At least one dimension stays.
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


class TicketOffice:
    """Zeroed int32 counters for kernels whose last program finishes the work and resets the counter.

    Two launches that may overlap must not share a counter. Launches on one stream follow each other, so a
    stream keeps its counters. A captured launch replays on any stream at any time, so it gets counters of its
    own, for good. All lie in one block per device, allocated by a thread of its own: a CUDA graph's private
    pool, which the caller may have entered, is recycled without asking. Where the block is spent, or would
    have to be allocated inside a capture, the counters are fresh zeros, which costs a launch.
    """

    SLOTS = 1 << 16

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: Tensor | None = None
        self._used = 0
        self._kept: dict[Hashable, Tensor] = {}

    def counters(self, count: int, device: torch.device, stream: Hashable, capturing: bool) -> Tensor:
        """`count` zeroed int32 counters for a launch on `stream`, or one that is being captured."""
        with self._lock:
            if not capturing and (stream, count) in self._kept:
                return self._kept[stream, count]
            if self._block is None and not capturing:
                self._block = _allocate_aside(self.SLOTS, device)
            if self._block is None or self._used + count > self.SLOTS:
                return torch.zeros(count, dtype=torch.int32, device=device)
            counters = self._block[self._used : self._used + count]
            self._used += count
            if not capturing:
                self._kept[stream, count] = counters
            return counters


def _allocate_aside(count: int, device: torch.device) -> Tensor:
    """int32 zeros, allocated and filled outside of any memory pool or stream that this thread has entered."""
    result: list[Tensor] = []

    def allocate() -> None:
        result.append(torch.zeros(count, dtype=torch.int32, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once per device: every stream may read the zeros from now on

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    return result[0]


_offices: dict[int, TicketOffice] = {}


def tickets(count: int, device: torch.device) -> Tensor:
    """`count` zeroed int32 counters on `device` that the launch under way must leave at zero."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(index):
        capturing = torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(index).cuda_stream
    return _offices.setdefault(index, TicketOffice()).counters(count, device, stream, capturing)
