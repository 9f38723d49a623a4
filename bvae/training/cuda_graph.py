"""A whole training step as one CUDA graph: the host's work per step is one replay."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WARM_UP = 11  # steps on the side stream: compilation, cuDNN's choice of algorithms, the optimizer's state


@contextmanager
def preserved(tensors: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """Let a block change tensors; afterwards they hold what they held, at the same addresses.

    Those that `tensors` gives only afterwards, such as an optimizer's state, are new, and become zero.
    """
    before = {tensor: tensor.clone() for tensor in tensors()}  # a tensor's hash is its identity
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
    """
    graph, stream, fits = torch.cuda.CUDAGraph(), torch.cuda.Stream(), True
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
            if not _is_out_of_memory(error):
                raise
            fits = False
    if fits:
        return graph.replay
    del graph  # and with it what it has taken so far
    torch.cuda.empty_cache()
    return None


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was short.

    The allocator says so by its own error; the driver, which makes the graph, by text; and where ending the
    broken capture raises in its turn, the reason is that error's context.
    """
    while error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__context__
    return False
