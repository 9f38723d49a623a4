"""Errors in a user's input, and how a command reports them: one line on stderr, no traceback."""

import contextlib
import errno
import functools
import sys
from collections.abc import Callable, Iterator

from bvae.streams import robust

# The extra in setup.py that brings a module.
EXTRA = {
    **dict.fromkeys(("PIL", "matplotlib", "scipy", "sklearn", "tensorboard"), "train"),
    **dict.fromkeys(("threadpoolctl", "torchvision", "tqdm", "tyro", "yaml"), "train"),
    "huggingface_hub": "hub",
    "mlflow": "mlflow",
    "wandb": "wandb",
    **dict.fromkeys(("torch_fidelity", "torchmetrics"), "quality"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
}

FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk or a quota
# What file systems answer that have no locks, or no fsync of a folder.
UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class UsageError(ValueError):
    """Input that cannot be used. The message says what was wrong, where, and what to do."""


class MissingError(UsageError, FileNotFoundError):
    """A file or folder that does not exist."""


def exit_status(work: Callable[[], int | None]) -> int:
    """Do the work, and return its exit status (None: 0), or the status for the exception that stopped it.

    2: input that cannot be used (UsageError, or OSError with a path), or a package that is missing. 1: the
    disk is full. 130: Ctrl-C. Any other exception is a bug, and is raised with its traceback.
    """
    with robust():
        return _exit_status(work)


def _exit_status(work: Callable[[], int | None]) -> int:
    try:
        return work() or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if not (text := missing(error)):
            raise
        print(f"error: {text}", file=sys.stderr)
        return 2
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FULL and error.filename is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1 if error.errno in FULL else 2


@functools.cache
def say_once(text: str) -> None:
    """Print a line on stderr, once in a process."""
    print(text, file=sys.stderr, flush=True)


def missing(error: ModuleNotFoundError) -> str | None:
    """What to install, if the missing package belongs to one of our extras; else None."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA:
        return None
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    command = spec.name if spec and spec.name.startswith("bvae.") else "bvae"
    return f"{command} needs {package}: pip install 'bvae[{EXTRA[package]}]'"


@contextlib.contextmanager
def needs_train_extra(module: str) -> Iterator[None]:
    """Use it around a command's imports, some of which need the extra `train`.

    If one is missing, the command that is run ends with one line and status 2. A command that is imported
    raises ModuleNotFoundError with that line.

    Args:
        module: the command's `__name__`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not (text := missing(error)):
            raise
        if module != "__main__":
            raise ModuleNotFoundError(text, name=error.name) from None
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
