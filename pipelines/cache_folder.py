"""Where decoded images are kept. No torch: a command's `--help` shows it."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from bvae.errors import UsageError, say_once


def default_folder() -> Path:
    """Where caches are kept unless the user says otherwise."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "bvae"
    folder = Path(os.path.expanduser("~"), ".cache", "bvae")
    nearest = next((path for path in (folder, *folder.parents) if path.is_dir()), Path())
    if folder.is_absolute() and os.access(nearest, os.W_OK):
        return folder
    folder = Path(tempfile.gettempdir(), f"bvae-{os.getuid()}")  # as in a container with a user of a number
    say_once(f"no home folder can be written: caches are in {folder}, or in --cache-dir")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UsageError(f"{folder} is not a folder of yours: name one with --cache-dir")
    return folder
