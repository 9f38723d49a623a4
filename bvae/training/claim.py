"""Take a run folder: one run alone writes there, from the choice of the name to the end."""

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bvae import files
from bvae.errors import UsageError
from bvae.owner import LOCK, own
from bvae.training import checkpoint
from bvae.training.distributed import Distributed


@contextlib.contextmanager
def claim(
    out: Path | None, name: str, distributed: Distributed, *, resume: bool = False, restart: bool = False
) -> Iterator[Path]:
    """Make the run folder, or take an existing one, and hold its lock. If it stays empty, it is removed.

    Args:
        out: the folder. None: the first free runs/<name>-<number>.
        resume: it exists, and a run continues in it.
        restart: it may exist, if the run in it has not come to a checkpoint.

    Raises:
        UsageError: the folder exists, or has another owner.
        OSError: it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        failure: Exception | None = None
        if distributed.is_main:
            try:
                if not resume:
                    out, new = _make(out, name, restart)
                    if new:
                        stack.callback(_remove_empty, out)
                assert out
                _check_writable(out)
                stack.enter_context(own(out))
                files.remove_abandoned(out)
                if restart:
                    _check_unstarted(out)
            except (UsageError, OSError) as error:
                failure = error
        out, failed = distributed.broadcast((out, failure is not None))
        if failure:
            raise failure
        if failed:
            raise UsageError("rank 0 cannot use the run folder: its message says why")
        assert out
        yield out


def _make(out: Path | None, name: str, restart: bool) -> tuple[Path, bool]:
    """The folder, and whether it was made here: of several processes one alone can make it."""
    if out:
        if out.exists() and not restart:
            raise _exists(out)
        _check_writable(out)
        try:
            _make_folder(out)
        except FileExistsError:
            if not restart:
                raise _exists(out) from None
            return out, False
        return out, True
    for number in itertools.count(1):
        out = Path("runs", f"{name}-{number}")
        if not out.exists():
            _check_writable(out)
            with contextlib.suppress(FileExistsError):  # another run was faster
                _make_folder(out)
                return out, True
    raise AssertionError


def _make_folder(out: Path) -> None:
    """Make a new folder. Raises FileExistsError; OSError."""
    files.make_folder(out.parent)
    out.mkdir()
    files.sync(out.parent)


def _exists(out: Path) -> UsageError:
    return UsageError(f"{out} exists: name another folder with --out, or continue with --resume {out}")


def _check_unstarted(out: Path) -> None:
    names = {path.name for path in out.iterdir()} - {LOCK}
    if checkpoint.checkpoints(out / checkpoint.FOLDER) or (names and "config.yaml" not in names):
        raise _exists(out)


def _check_writable(out: Path) -> None:
    """Raise errors of the run folder now, not only after the data have been decoded."""
    checkpoint.check_folder(out / checkpoint.FOLDER)
    for folder in (out, out / checkpoint.FOLDER):
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise UsageError(f"{nearest} is a file: name another run folder with --out")
        try:
            with tempfile.TemporaryFile(dir=nearest) as file:
                file.write(b"test")
        except OSError as error:
            text = f"{error.strerror}: name another run folder with --out, or make that one writable"
            raise OSError(error.errno, text, str(nearest)) from None


def _remove_empty(out: Path) -> None:
    with contextlib.suppress(OSError):  # it holds a run
        out.rmdir()
