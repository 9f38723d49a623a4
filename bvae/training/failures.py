"""Messages of a training command that fails: what happened, and how to continue."""

import contextlib
import shlex
import sys
from pathlib import Path

from bvae import disk, files
from bvae.errors import FULL, UsageError, missing
from bvae.paths import name_option
from bvae.training import checkpoint
from bvae.training.cli import Arguments
from bvae.training.cuda_graph import is_out_of_memory
from bvae.training.distributed import lost_connection, rank_suffix
from bvae.training.run import Run
from bvae.training.step import DiscriminatorDiverged, NotFinite

SHOWN = 3  # images of a batch that are named on the screen


def explain(error: BaseException, run: Run | None, arguments: Arguments | None) -> int | None:
    """Print what an error means, and return the exit status; None for a bug, which needs its traceback.

    Args:
        run: None until it is ready.
        arguments: None until the command line is read.
    """
    out = run.out if run else None
    if isinstance(error, KeyboardInterrupt):
        folder = out or (arguments.resume if arguments else None)
        print(f"stopped. {continue_with(folder)}", flush=True)
        return 0 if folder and checkpoint.checkpoints(folder / checkpoint.FOLDER) else 130
    if isinstance(error, NotFinite) and run:
        option = "--discriminator-lr" if isinstance(error, DiscriminatorDiverged) else "--lr"
        _print_error(f"{error}{_batch(run, error.step)}. A lower {option} may help. {continue_with(out)}")
        return 1
    if isinstance(error, UsageError):
        _print_error(f"{error}. {continue_with(out)}" if run else str(error))
        return 1 if run else 2
    if isinstance(error, ModuleNotFoundError) and (text := missing(error)):
        _print_error(text)
        return 2
    if isinstance(error, OSError) and (error.filename or error.errno in FULL):
        if arguments:
            name_option(error, arguments)
        _print_error(f"{error}{_free_bytes(error, out)}. {continue_with(out)}" if out else str(error))
        return 2 if out is None and error.errno not in FULL else 1
    if is_out_of_memory(error):
        _print_error(f"out of memory: {str(error).splitlines()[0]}")
        print("a smaller --batch-size or --hidden-dims needs less memory", file=sys.stderr)
        return 1
    if isinstance(error, RuntimeError) and lost_connection(error):
        _print_error(f"another process has ended: its message says why. {continue_with(out)}")
        return 1
    return None


def continue_with(out: Path | None, module: str = "bvae.train") -> str:
    """How to continue a run from its checkpoints, by the command `python -m module`."""
    paths = checkpoint.checkpoints(out / checkpoint.FOLDER) if out else []
    if not paths:
        return "No checkpoint was written"
    command = shlex.join([sys.executable, "-m", module, "--resume", str(out)])
    return f"The last good checkpoint is {paths[-1].name}; continue with: {command}"


def _free_bytes(error: OSError, out: Path) -> str:
    """What is free on a full disk, unless the error names them."""
    if error.errno not in FULL or "are free" in str(error):
        return ""
    return f": {disk.free(out)}"


def _batch(run: Run, step: int) -> str:
    """The images of a step: the first few, and the file that lists all."""
    assert run.out
    images, path = [files.one_line(image) for image in run.images(step)], run.out / f"batch-{step}.txt"
    with contextlib.suppress(OSError):
        files.write_text(path, "\n".join([*images, ""]))
    return f", on {', '.join(images[:SHOWN])} and {len(images) - SHOWN} more (all are in {path})"


def _print_error(text: str) -> None:
    print(f"error{rank_suffix()}: {text}", file=sys.stderr)
