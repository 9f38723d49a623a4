"""A whole training step as one CUDA graph: the host's work per step is one replay."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Texts of errors without a type of their own: of the CPU's allocator, of the driver, which makes the graph,
# of cuBLAS and of cuDNN.
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
    """Restore tensors after a block that changes them: the old values, at the same addresses.

    Tensors that exist only after the block, such as an optimizer's state, are set to zero.
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
    """Capture `step` as a CUDA graph; return the function that replays it, or None if memory is too small.

    `step` first runs some times on a side stream. `state` must give every tensor that it changes; they are
    restored, so the first replay is the first step.

    Raises:
        CaptureFailed: a graph cannot hold the step; the message names the option to use.
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
    del graph  # and the memory that it has taken so far
    torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the CPU or a GPU."""
    return any(
        isinstance(each, torch.OutOfMemoryError)
        or (isinstance(each, RuntimeError) and any(text in str(each) for text in _OUT_OF_MEMORY))
        for each in causes(error)
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes. If ending a broken capture raises another error, the cause is that error's
    context."""
    each: BaseException | None = error
    while each:
        yield each
        each = each.__cause__ or each.__context__
