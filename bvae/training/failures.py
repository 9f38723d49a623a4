"""What a training command says when it fails: what happened, and how to continue."""

import contextlib
import shlex
import shutil
import sys
from pathlib import Path

from bvae import files
from bvae.errors import FULL, UsageError, missing
from bvae.training import checkpoint
from bvae.training.cuda_graph import is_out_of_memory
from bvae.training.distributed import lost_connection, rank_suffix
from bvae.training.run import Run
from bvae.training.step import NotFinite

SHOWN = 3  # images of a batch that are named on the screen


def explain(error: BaseException, run: Run | None, resumed: Path | None) -> int | None:
    """Print what an error means, and return the exit status; None if it is a bug, whose traceback is needed.

    Args:
        run: None until it is ready.
        resumed: the run folder that the command was to continue.
    """
    out = run.out if run else None
    if isinstance(error, KeyboardInterrupt):
        folder = out or resumed
        print(f"stopped. {continue_with(folder)}", flush=True)
        return 0 if folder and checkpoint.checkpoints(folder / checkpoint.FOLDER) else 130
    if isinstance(error, NotFinite) and run:
        _complain(f"{error}{_batch(run, error.step)}. A lower --lr may help. {continue_with(out)}")
        return 1
    if isinstance(error, UsageError):
        _complain(f"{error}. {continue_with(out)}" if run else str(error))
        return 1 if run else 2
    if isinstance(error, ModuleNotFoundError) and (text := missing(error)):
        _complain(text)
        return 2
    if isinstance(error, OSError) and (error.filename or error.errno in FULL):
        _complain(f"{error}{_room(error, out)}. {continue_with(out)}" if out else str(error))
        return 2 if out is None and error.errno not in FULL else 1
    if is_out_of_memory(error):
        _complain(f"out of memory: {str(error).splitlines()[0]}")
        print("a smaller --batch-size or --hidden-dims needs less", file=sys.stderr)
        return 1
    if isinstance(error, RuntimeError) and lost_connection(error):
        _complain(f"another process has ended: its message says why. {continue_with(out)}")
        return 1
    return None


def continue_with(out: Path | None) -> str:
    """How to continue from what a run has left."""
    found = checkpoint.checkpoints(out / checkpoint.FOLDER) if out else []
    if not found:
        return "No checkpoint was written"
    command = shlex.join([sys.executable, "-m", "bvae.train", "--resume", str(out)])
    return f"The last good checkpoint is {found[-1].name}; continue with: {command}"


def _room(error: OSError, out: Path) -> str:
    """What is left of a disk that is full, unless the error says so."""
    if error.errno not in FULL or "are free" in str(error):
        return ""
    return f": {shutil.disk_usage(out).free:,} bytes are free"


def _batch(run: Run, step: int) -> str:
    """Which images a step saw: some of them, and the file with all."""
    assert run.out
    images, path = run.images(step), run.out / f"batch-{step}.txt"
    with contextlib.suppress(OSError):
        files.write_text(path, "\n".join([*images, ""]))
    return f", on {', '.join(images[:SHOWN])} and {len(images) - SHOWN} more (all are in {path})"


def _complain(text: str) -> None:
    print(f"error{rank_suffix()}: {text}", file=sys.stderr)
