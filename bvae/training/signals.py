"""Requests to stop from the keyboard, a scheduler or SLURM, remembered until the step is done."""

import signal
import threading
from collections.abc import Sequence
from types import FrameType

# Of Ctrl-C, schedulers, SLURM, and a terminal that is closed.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Remembers a signal until the step is done; a second signal has its usual effect.

    If `interrupt_now` is set (nothing is unsaved), the signal raises KeyboardInterrupt. Python delivers
    signals to the main thread only: in another thread this class catches none.
    """

    def __init__(self, numbers: Sequence[int] = STOPS) -> None:
        self.signal: int | None = None
        self.interrupt_now = True
        if threading.current_thread() is not threading.main_thread():
            numbers = ()
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            numbers = [number for number in numbers if number != signal.SIGHUP]
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()
        if self.interrupt_now:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
