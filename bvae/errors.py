"""What is wrong with a user's input, and how a command then ends: one line on stderr, no traceback."""

import errno
import sys
from collections.abc import Callable


class UsageError(ValueError):
    """Input that cannot be used. The message says what was wrong, where, and what to do."""


class MissingError(UsageError, FileNotFoundError):
    """A file or folder that is not there."""


def exit_status(work: Callable[[], int | None]) -> int:
    """Do the work, and give its own exit status (None: 0), or that of what stopped it.

    2: not as asked for (ValueError, OSError). 1: the disk is full. 130: Ctrl-C.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, OSError) and error.errno == errno.ENOSPC else 2
