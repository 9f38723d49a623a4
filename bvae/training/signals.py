"""Requests to stop, from the keyboard, a scheduler or SLURM, kept until a step is done."""

import signal
from types import FrameType


class StopRequest:
    """Remembers Ctrl-C, SIGTERM and SLURM's SIGUSR1 until the step is done; a second one acts as usual.

    While `at_once`, nothing would be lost, and they raise KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.at_once = True
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()
        if self.at_once:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
