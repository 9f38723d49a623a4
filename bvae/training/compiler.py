"""Failures of torch.compile and Triton, and how a run handles them.

A process that is killed while it compiles leaves a truncated file in the compiler's cache, and every later
run would fail on it. Such files are deleted and compiled again.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from bvae import disk
from bvae.errors import FULL, say_once
from bvae.kernels import launch
from bvae.opening import TABLE, WEIGHTS, open_regular, read_bytes
from bvae.pipelines.cache_folder import default_folder
from bvae.training.cuda_graph import CaptureFailed, causes, is_out_of_memory

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")

_LIBRARIES = (".so", ".cubin", ".hsaco")  # ELF files
# Names of the caches' entries: c and 51 base32 digits (inductor), or 52 base32 digits (Triton).
_KEYS = re.compile(r"(?<![A-Za-z0-9])(c[a-z2-7]{51}|[A-Z2-7]{52})(?![A-Za-z0-9])")


class CompileFailed(Exception):
    """The compiler cannot work on this machine; the message says what to do."""


def caches() -> list[Path]:
    """The folders of inductor's and of Triton's cache that exist."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    if home.startswith("~"):  # there is none: Triton would make a folder of that name here
        os.environ.setdefault("TRITON_CACHE_DIR", str(default_folder() / "triton"))
    triton = Path(home, ".triton", "cache")
    folders = (Path(cache_dir()), Path(os.environ.get("TRITON_CACHE_DIR", triton)))
    return [folder for folder in folders if folder.is_dir()]


def remove_truncated() -> None:
    """Delete the truncated libraries and JSON files in the compiler's cache; print how many.

    Loading such a library may kill the process (SIGBUS), so call this before anything is compiled.
    """
    if sys.platform != "linux":  # its libraries are not ELF files
        return
    for folder in caches():
        paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
        broken = filter(_is_truncated, paths)
        removed = [path for path in broken if _remove_unlocked(path, folder)]
        if removed:
            _print_error(f"{len(removed)} truncated files are deleted from the compiler's cache {folder}")


def _is_truncated(path: Path) -> bool:
    try:
        if path.suffix in _LIBRARIES:
            with open_regular(path, WEIGHTS) as file:
                return not _is_whole_library(file.read(64), path.stat().st_size)
        if path.suffix == ".json":
            json.loads(read_bytes(path, TABLE))
    except ValueError:
        return True
    except OSError:  # another process was faster
        return False
    return False


def _is_whole_library(header: bytes, size: int) -> bool:
    """Whether an ELF file is as long as its tables say; one of them is last in the file."""
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    segments, sections = struct.unpack_from("<QQ", header, 32)
    segment_size, n_segments, section_size, n_sections = struct.unpack_from("<4H", header, 54)
    return size >= max(segments + segment_size * n_segments, sections + section_size * n_sections)


def _remove_unlocked(path: Path, folder: Path) -> bool:
    """Delete a truncated file, unless another process is writing it: inductor then holds a lock."""
    lock = folder / "locks" / f"{path.name.split('.')[0]}.lock"
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # locked, or another user's file
        if lock.exists():  # Triton has no locks: it writes files atomically
            fcntl.flock(stack.enter_context(lock.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_truncated(path):
            path.unlink()
            return True
    return False


class _FullDisk(logging.Filter):
    """Says in one line what PyTorch logs with a traceback: a full disk on which it only keeps copies."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, OSError) and error.errno in FULL:
            say_once(f"{error.strerror}: the compiler cannot fill its cache: the next run compiles again")
            return False
        return True


@contextlib.contextmanager
def _full_disk_in_one_line() -> Iterator[None]:
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    handlers = {handler for name in names for handler in logging.getLogger(name).handlers}
    one_line = _FullDisk()
    for handler in handlers:
        handler.addFilter(one_line)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(one_line)


@_full_disk_in_one_line()
def first_step(attempt: Callable[[], T], recompile: Callable[[bool], None], *, compile: bool) -> T:
    """Return the result of `attempt`, which calls compiled code for the first time and can be repeated.

    If it fails on files of the cache, these are deleted, and it is tried again: first compiled, and if that
    fails too, in eager mode. A line is printed each time.

    Args:
        recompile: discards the compiled code; its argument says whether the next attempt compiles.
        compile: whether the first attempt uses torch.compile.

    Raises:
        CompileFailed: the compiler fails for another reason; the message names it and the option to use.
        OSError: the disk is full; the message says where and how much is free.
    """
    for again in (True, False) if compile else ():
        try:
            return attempt()
        except Exception as error:
            _raise_other_errors(error)
            if again and not _delete_named_entries(error):
                raise CompileFailed(_advice(error, compile)) from error
            if not again:
                traceback.print_exc()
            failure = _reason(error)
        # Outside of the except clause: a later error does not come from this one.
        if again:
            _print_error(f"torch.compile failed ({failure}): its files are deleted and compiled again")
        else:
            _print_error(f"torch.compile failed again ({failure}): eager mode is used, as with --no-compile")
        _discard_compiled()
        recompile(again)
    try:
        return attempt()
    except Exception as error:
        _raise_other_errors(error)
        raise CompileFailed(_advice(error, False)) from error


@_full_disk_in_one_line()
def why_not(attempt: Callable[[], bool | None]) -> str | None:
    """The reason why code cannot be compiled or captured on this machine, in one line; None: it can.

    Args:
        attempt: calls the code, once. It returns False if memory is short.
    """
    try:
        return "the graph does not fit the GPU's memory" if attempt() is False else None
    except Exception as error:
        if isinstance(error, CaptureFailed):
            return _reason(error.__cause__ or error)
        if is_out_of_memory(error) or _is_from_compiler(error):
            return _reason(error)
        raise


def _raise_other_errors(error: Exception) -> None:
    """Raise the error again if it is not the compiler's, and OSError for a full disk."""
    if isinstance(error, CaptureFailed) or is_out_of_memory(error) or not _is_from_compiler(error):
        raise error
    full = [each.errno for each in causes(error) if isinstance(each, OSError) and each.errno in FULL]
    full += [number for number in FULL if os.strerror(number) in _text(error)]  # from the C++ compiler
    if full:
        folders = (*caches(), Path(tempfile.gettempdir()))
        fullest = min(folders, key=lambda folder: shutil.disk_usage(folder).free)
        text = f"{os.strerror(full[0])}: the compiler needs space, and {disk.free(fullest)}"
        raise OSError(full[0], text, str(fullest)) from None


def _is_from_compiler(error: BaseException) -> bool:
    """Whether an error comes from dynamo, inductor or Triton, which raise many types of exceptions."""
    types = {type(each).__module__ for each in causes(error)}
    frames = {
        frame.f_globals.get("__name__", "")
        for each in causes(error)
        for frame, _ in traceback.walk_tb(each.__traceback__)
    }
    return any(name.startswith(("torch._dynamo.exc", "torch._inductor", "triton")) for name in types | frames)


def _text(error: BaseException) -> str:
    """An error's message, with its traceback and its causes."""
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def _delete_named_entries(error: BaseException) -> bool:
    """Delete the cache entries that an error names; return whether there were any."""
    paths = [
        path
        for folder in caches()
        for key in set(_KEYS.findall(_text(error)))
        for path in (*folder.glob(f"{key[1:3]}/{key}.*"), *folder.glob(f"**/{key}/*"))
        if path.is_file()
    ]
    for path in paths:
        with contextlib.suppress(OSError):  # another process was faster, or it is another user's
            path.unlink()
    return bool(paths)


def _discard_compiled() -> None:
    """Discard everything that this process has compiled and loaded."""
    import torch._dynamo
    from torch._inductor.utils import clear_caches

    torch._dynamo.reset()
    clear_caches()
    for name in [name for name in sys.modules if _KEYS.search(name)]:
        del sys.modules[name]


def _reason(error: BaseException) -> str:
    """The error in one line."""
    while inner := getattr(error, "inner_exception", None):
        error = inner
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {next((line for line in lines if 'rror:' in line), lines[0])}"


def _advice(error: BaseException, compile: bool) -> str:
    failing, option = ("torch.compile", "--no-compile") if compile else ("a Triton kernel", "--no-fused")
    if compile and launch.NETWORK:  # it compiles our kernels too
        option = "--no-compile or --no-fused"
    return (
        f"{failing} failed ({_reason(error)}): {option} trains without it; python -m bvae.doctor says what "
        "is missing"
    )


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
