"""Counters by which the last program of a launch finds out that it is the last; safe to replay."""

import threading
from collections.abc import Hashable

import torch
from torch import Tensor

from bvae.kernels.launch import power_of_two


class CounterPool:
    """Zeroed int32 counters for kernels whose last program finishes the work and resets the counter.

    Two launches that may overlap must not share a counter. Launches on one stream follow each other, so a
    stream keeps its counters, and a launch that needs fewer takes the first of them. A captured launch
    replays on any stream at any time, so it gets its own counters, which no other launch ever uses. All
    counters lie in one block per device. A separate thread allocates the block, because the caller may have
    entered a CUDA graph's private pool, whose memory is recycled. If the block is full, or would have to be
    allocated inside a capture, the counters are new zeros, which costs one more launch.

    Every slice starts at a multiple of 16 bytes. Triton compiles one kernel for aligned pointers and another
    for unaligned ones. A captured launch must find the kernel that its warm-up compiled, because a module
    cannot be loaded inside a capture.
    """

    SLOTS = 1 << 16
    ALIGNED = 4  # slices are multiples of this many counters: 16 bytes

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: Tensor | None = None
        self._used = 0
        self._of_stream: dict[Hashable, Tensor] = {}

    def counters(self, count: int, device: torch.device, stream: Hashable, capturing: bool) -> Tensor:
        """`count` zeroed int32 counters for a launch on `stream`, or one that is being captured."""
        with self._lock:
            own = self._of_stream.get(stream)
            if not capturing and own is not None and len(own) >= count:
                return own[:count]
            if self._block is None and not capturing:
                self._block = _allocate_in_thread(self.SLOTS, device)
            # a growing stream doubles its slice, so those it leaves behind are no larger together
            slots = count + -count % self.ALIGNED if capturing else max(power_of_two(count), self.ALIGNED)
            if self._block is None or self._used + slots > self.SLOTS:
                return torch.zeros(count, dtype=torch.int32, device=device)
            counters = self._block[self._used : self._used + slots]
            self._used += slots
            if not capturing:
                self._of_stream[stream] = counters
            return counters[:count]


def _allocate_in_thread(count: int, device: torch.device) -> Tensor:
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


_pools: dict[int, CounterPool] = {}


def completion_counters(count: int, device: torch.device) -> Tensor:
    """`count` zeroed int32 counters on `device`; the launch that uses them must reset them to zero."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(index):
        capturing = torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(index).cuda_stream
    return _pools.setdefault(index, CounterPool()).counters(count, device, stream, capturing)
