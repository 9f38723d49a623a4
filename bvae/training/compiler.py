"""What goes wrong with torch.compile and Triton, and what a run does about it.

A process that is killed while it compiles leaves a file cut short in the compiler's cache, on which every
later run would fail. Such files are deleted and compiled again.
"""

import contextlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bvae.errors import FULL
from bvae.training.cuda_graph import CaptureFailed, causes, is_out_of_memory

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")

_LIBRARIES = (".so", ".cubin", ".hsaco")  # ELF files
# What the caches call their entries: a letter and 51 base32 digits (inductor), or 52 of them (Triton).
_KEYS = re.compile(r"(?<![A-Za-z0-9])(c[a-z2-7]{51}|[A-Z2-7]{52})(?![A-Za-z0-9])")


class CompileFailed(Exception):
    """The compiler cannot do its work here; the message says what to do."""


def caches() -> list[Path]:
    """The folders of inductor's and of Triton's cache that exist."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    triton = Path(os.environ.get("TRITON_HOME", "~"), ".triton", "cache").expanduser()
    folders = (Path(cache_dir()), Path(os.environ.get("TRITON_CACHE_DIR", triton)))
    return [folder for folder in folders if folder.is_dir()]


def remove_truncated() -> None:
    """Delete the libraries and JSON files in the compiler's cache that are cut short; a line says how many.

    Loading such a library may end the process (SIGBUS), so this comes before anything is compiled.
    """
    if sys.platform != "linux":  # its libraries are not ELF files
        return
    for folder in caches():
        paths = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
        broken = filter(_is_truncated, paths)
        removed = [path for path in broken if _remove_unlocked(path, folder)]
        if removed:
            _say(f"{len(removed)} files cut short are deleted from the compiler's cache {folder}")


def _is_truncated(path: Path) -> bool:
    try:
        if path.suffix in _LIBRARIES:
            with path.open("rb") as file:
                return not _is_whole_library(file.read(64), path.stat().st_size)
        if path.suffix == ".json":
            json.loads(path.read_bytes())
    except ValueError:
        return True
    except OSError:  # another process was faster
        return False
    return False


def _is_whole_library(header: bytes, size: int) -> bool:
    """Whether an ELF file reaches to the end of its tables, one of which comes last."""
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    segments, sections = struct.unpack_from("<QQ", header, 32)
    segment_size, n_segments, section_size, n_sections = struct.unpack_from("<4H", header, 54)
    return size >= max(segments + segment_size * n_segments, sections + section_size * n_sections)


def _remove_unlocked(path: Path, folder: Path) -> bool:
    """Delete a file that is cut short, unless another process is writing it: inductor holds a lock then."""
    lock = folder / "locks" / f"{path.name.split('.')[0]}.lock"
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # locked, or another user's file
        if lock.exists():  # Triton has none: its files appear whole
            fcntl.flock(stack.enter_context(lock.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_truncated(path):
            path.unlink()
            return True
    return False


def first_step(attempt: Callable[[], T], recompile: Callable[[bool], None], *, compile: bool) -> T:
    """What `attempt` gives: the first call of everything that is compiled. It can be repeated.

    If it fails on files of the cache they are deleted, and it is tried again: compiled, and if that fails as
    well in eager mode, which a line says.

    Args:
        recompile: forgets what has been compiled; the next attempt is to compile, or not to.
        compile: whether the first attempt does, by torch.compile.

    Raises:
        CompileFailed: the compiler fails for another reason; the message names it and the option to use.
        OSError: the disk is full; the message says where and how much is free.
    """
    for again in (True, False) if compile else ():
        try:
            return attempt()
        except Exception as error:
            _check(error)
            if again and not _forget(error):
                raise CompileFailed(_advice(error, compile)) from error
            if not again:
                traceback.print_exc()
            failure = _reason(error)
        # Outside of the except clause: a later error does not come from this one.
        if again:
            _say(f"torch.compile failed ({failure}): the files concerned are deleted and compiled again")
        else:
            _say(f"torch.compile failed again ({failure}): training runs in eager mode, as with --no-compile")
        _reset()
        recompile(again)
    try:
        return attempt()
    except Exception as error:
        _check(error)
        raise CompileFailed(_advice(error, False)) from error


def _check(error: Exception) -> None:
    """Raise what is not the compiler's failure."""
    if isinstance(error, CaptureFailed) or is_out_of_memory(error) or not _is_from_compiler(error):
        raise error
    full = [each.errno for each in causes(error) if isinstance(each, OSError) and each.errno in FULL]
    full += [number for number in FULL if os.strerror(number) in _text(error)]  # from the C++ compiler
    if full:
        free = {folder: shutil.disk_usage(folder).free for folder in (*caches(), Path(tempfile.gettempdir()))}
        place = min(free, key=lambda folder: free[folder])
        text = f"{os.strerror(full[0])}: the compiler needs room, and {free[place]:,} bytes are free"
        raise OSError(full[0], text, str(place)) from None


def _is_from_compiler(error: BaseException) -> bool:
    """Whether an error arose in dynamo, inductor or Triton, which raise all kinds of exceptions."""
    types = {type(each).__module__ for each in causes(error)}
    frames = {
        frame.f_globals.get("__name__", "")
        for each in causes(error)
        for frame, _ in traceback.walk_tb(each.__traceback__)
    }
    return any(name.startswith(("torch._dynamo.exc", "torch._inductor", "triton")) for name in types | frames)


def _text(error: BaseException) -> str:
    """All that an error says, with the files in its traceback and its causes."""
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def _forget(error: BaseException) -> bool:
    """Delete the cache's entries that an error names; whether there were any."""
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


def _reset() -> None:
    """Let this process forget what it has compiled and loaded."""
    import torch._dynamo
    from torch._inductor.utils import clear_caches

    torch._dynamo.reset()
    clear_caches()
    for name in [name for name in sys.modules if _KEYS.search(name)]:
        del sys.modules[name]


def _reason(error: BaseException) -> str:
    """What failed, in one line."""
    while inner := getattr(error, "inner_exception", None):
        error = inner
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {next((line for line in lines if 'rror:' in line), lines[0])}"


def _advice(error: BaseException, compile: bool) -> str:
    what, option = ("torch.compile", "--no-compile") if compile else ("a Triton kernel", "--no-fused")
    return (
        f"{what} failed ({_reason(error)}): {option} trains without it; python -m bvae.doctor looks for what "
        "is missing"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
