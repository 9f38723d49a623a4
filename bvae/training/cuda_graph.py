"""A whole training step as one CUDA graph: the host's work per step is one replay."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# What says so by text alone: the CPU's allocator, the driver, which makes the graph, cuBLAS and cuDNN.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory: you tried to allocate",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
)

WARM_UP = 11  # steps on the side stream: compilation, cuDNN's choice of algorithms, the optimizer's state


class CaptureFailed(Exception):
    """A step cannot be a CUDA graph; the message says what to do."""


@contextmanager
def preserved(tensors: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """Let a block change tensors; afterwards they hold what they held, at the same addresses.

    Those that `tensors` gives only afterwards, such as an optimizer's state, are new, and become zero.
    """
    # A tensor's hash is its identity. Detached: a clone with a graph keeps the parameter's AccumulateGrad
    # node alive, which belongs to this stream, and a capture on another stream must not wait for this one.
    before = {tensor: tensor.detach().clone() for tensor in tensors()}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor in tensors():
                if tensor in before:
                    tensor.copy_(before[tensor])
                else:
                    tensor.zero_()


def capture(step: Callable[[], None], state: Callable[[], Iterable[Tensor]]) -> Callable[[], None] | None:
    """`step` as a CUDA graph: the function that replays it; None if the graph does not fit the memory.

    Runs `step` some times on a side stream first. Whatever it changes must be among `state`, which is left as
    it was: the first replay is the first step.

    Raises:
        CaptureFailed: the step does what a graph cannot hold; the message names the option to use.
    """
    graph, stream, fits = torch.cuda.CUDAGraph(), torch.cuda.Stream(), True
    current = torch.cuda.current_stream()
    with preserved(state):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.graph(graph, stream=stream):
                step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture whose end fails leaves its own stream
            if not is_out_of_memory(error):
                line = (str(error).splitlines() or [""])[0]
                text = f"the step cannot be a CUDA graph ({line}): --no-capture trains without one"
                raise CaptureFailed(text) from error
            fits = False
    if fits:
        return graph.replay
    del graph  # and with it what it has taken so far
    torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, on the CPU or a GPU."""
    return any(
        isinstance(each, torch.OutOfMemoryError)
        or (isinstance(each, RuntimeError) and any(text in str(each) for text in _OUT_OF_MEMORY))
        for each in causes(error)
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those from which it came: where ending a broken capture raises in its turn, the reason
    is that error's context."""
    each: BaseException | None = error
    while each:
        yield each
        each = each.__cause__ or each.__context__
