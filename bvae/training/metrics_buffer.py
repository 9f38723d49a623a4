"""The last steps' numbers: written on the device, read by the host without making either wait."""

import torch
from torch import Tensor


class MetricsBuffer:
    """A ring of `length` float32 rows on a device, one per step, and one copy of it on its way to the host.

    Step k's row is row (k - 1) mod length.
    """

    def __init__(self, length: int, width: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.rows = torch.zeros(length, width, device=device)
        self._host = torch.zeros(length, width, pin_memory=cuda)
        self._copied = torch.cuda.Event() if cuda else None
        self._sent = 0  # steps whose rows have been sent, and received
        self._received = 0

    def start(self, done: int) -> None:
        """Go on as if `done` steps had been written and read."""
        self._sent = self._received = done

    def place(self, step: Tensor) -> Tensor:
        """Where the row of a step, 0-d int64 on the device, belongs: [1] int64."""
        return ((step - 1) % len(self.rows)).view(1)

    def write(self, place: Tensor, row: Tensor) -> None:
        """Write a row [1, width] to its place."""
        self.rows.index_copy_(0, place, row)

    def send(self, done: int) -> None:
        """Start to copy the rows of the steps up to `done`; those sent before must have been received."""
        assert self._received == self._sent >= done - len(self.rows)
        self._host.copy_(self.rows, non_blocking=True)
        if self._copied:
            self._copied.record()
        self._sent = done

    def receive(self, wait: bool) -> list[tuple[int, list[float]]]:
        """What was sent last, as (step, row) in order: once, and where not `wait`, once it has arrived."""
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
