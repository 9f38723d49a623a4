"""Standard streams that no character and no closed reader can break."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)  # `| head` has ended, or the terminal has


@contextlib.contextmanager
def robust() -> Iterator[None]:
    """Print what the streams cannot encode as escapes, and drop what nobody can read any more."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (_Robust(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:  # SystemExit too: Python's own flush would report a reader that is gone
        stdout = sys.stdout
        sys.stdout, sys.stderr = before
        stdout.flush()


class _Robust:
    """A stream whose writes go nowhere once its reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._call("write", text)
        return len(text)

    def flush(self) -> None:
        self._call("flush")

    def _call(self, name: str, *arguments: str) -> None:
        try:
            getattr(self._stream, name)(*arguments)
        except OSError as error:
            if error.errno not in GONE:
                raise
            # Python's own stream keeps what it could not write, and writes it again at its end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
