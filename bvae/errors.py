"""What is wrong with a user's input, and how a command then ends: one line on stderr, no traceback."""

import errno
import sys
from collections.abc import Callable

FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk or a quota


class UsageError(ValueError):
    """Input that cannot be used. The message says what was wrong, where, and what to do."""


class MissingError(UsageError, FileNotFoundError):
    """A file or folder that is not there."""


def exit_status(work: Callable[[], int | None]) -> int:
    """Do the work, and return its own exit status (None: 0), or that of what stopped it.

    2: input that cannot be used (UsageError, or OSError with a path). 1: the disk is full. 130: Ctrl-C. Any
    other exception is a bug, and passes with its traceback.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FULL and error.filename is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1 if error.errno in FULL else 2
