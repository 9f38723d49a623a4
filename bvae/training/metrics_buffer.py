"""The numbers of the last steps: written on the device, read by the host; neither waits for the other."""

import torch
from torch import Tensor


class MetricsBuffer:
    """A ring buffer of `length` float32 rows on a device, one per step, with one copy in flight to the host.

    The row of step k is row (k - 1) mod length.
    """

    def __init__(self, length: int, width: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.rows = torch.zeros(length, width, device=device)
        self._host = torch.zeros(length, width, pin_memory=cuda)
        self._copied = torch.cuda.Event() if cuda else None
        self._sent = 0  # steps whose rows have been sent
        self._received = 0

    def start(self, done: int) -> None:
        """Set the state as if `done` steps had been written and read."""
        self._sent = self._received = done

    def row_index(self, step: Tensor) -> Tensor:
        """The index of a step's row, int64 [1]; the step is 0-d int64 on the device."""
        return ((step - 1) % len(self.rows)).view(1)

    def write(self, index: Tensor, row: Tensor) -> None:
        """Write a row [1, width] at its index."""
        self.rows.index_copy_(0, index, row)

    def send(self, done: int) -> None:
        """Start to copy the rows of the steps up to `done`; rows sent earlier must have been received."""
        assert self._received == self._sent >= done - len(self.rows)
        self._host.copy_(self.rows, non_blocking=True)
        if self._copied:
            self._copied.record()
        self._sent = done

    def receive(self, wait: bool) -> list[tuple[int, list[float]]]:
        """The rows sent last, as (step, row) in order, only once. Without `wait`, [] until they arrive."""
        if self._received == self._sent:
            return []
        if self._copied:
            if wait:
                self._copied.synchronize()
            elif not self._copied.query():
                return []
        rows = self._host.tolist()
        steps = range(self._received + 1, self._sent + 1)
        self._received = self._sent
        return [(step, rows[(step - 1) % len(rows)]) for step in steps]
