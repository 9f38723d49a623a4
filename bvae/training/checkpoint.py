"""A run's state on disk: written atomically, verified when it is read, without pickled code."""

import contextlib
import io
import json
import math
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bvae import __version__, files
from bvae.errors import MissingError, UsageError
from bvae.kernels.cpu import library
from bvae.opening import CONFIG, WEIGHTS, read_bytes
from bvae.weights import difference

FOLDER = "checkpoints"  # in the run folder
KEPT = 2  # the two newest are kept, and the best one
BEST = "best.json"  # step and score of the best one


class Damaged(Exception):
    """A file whose bytes differ from the checkpoint that was written."""


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `step-<step>.pt` atomically, and delete all but the newest `KEPT` and the best.

    The file is complete and on the disk before it gets its name, so that a crash or a full disk does not
    damage the older ones. The versions of `torch`, `bvae` and `triton` are added to the state.

    Raises:
        OSError: the file cannot be written; for a full disk it says how many bytes are needed and free.
    """
    files.make_folder(folder)
    path = folder / f"step-{step:08d}.pt"
    files.write(path, lambda file: torch.save({**state, "versions": versions()}, file), _bytes(state))
    best = _best(folder)
    for old in checkpoints(folder)[:-KEPT]:
        if best is None or _step(old) != best["step"]:
            old.unlink()
    for unfinished in folder.glob(f"*{files.UNFINISHED}"):  # from a process that was killed
        unfinished.unlink()
    return path


def mark_best(folder: Path, step: int, score: float) -> None:
    """Compare the score of the checkpoint at a step with the best one's, and mark it if it is higher.

    Raises:
        OSError: the mark cannot be written.
    """
    best = _best(folder)
    if score > (best["score"] if best else -math.inf):
        files.write_text(folder / BEST, json.dumps({"step": step, "score": score}))


def check_folder(folder: Path) -> None:
    """Raise UsageError if the folder is a link: a stranger's could make a run delete files anywhere."""
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link: a run writes into its own folder alone")


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest first."""
    paths = (path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-[0-9]+", path.stem))
    return sorted(paths, key=_step)


def load_newest(folder: Path, device: torch.device) -> dict[str, Any]:
    """The newest checkpoint's state, its tensors on the device.

    A damaged file is renamed, with a line on stderr, and the checkpoint before it is used.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: all its checkpoints are damaged, or the folder is a link.
        OSError: the newest cannot be read.
    """
    check_folder(folder)
    paths = checkpoints(folder)
    if not paths:
        raise MissingError(f"{folder} holds no checkpoint: the run stopped before its first one; start again")
    for path in reversed(paths):
        try:
            return _load(path, device)
        except Damaged as damage:
            print(f"{path} is damaged ({damage}) and set aside", file=sys.stderr, flush=True)
            # Another process of this run may have been faster, or the disk is read-only.
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".damaged"))
    raise UsageError(f"{folder} holds no checkpoint that is not damaged: start the run again")


@contextlib.contextmanager
def of_another_kind(run: Path) -> Iterator[None]:
    """Give a ValueError, the reason why a run's newest checkpoint cannot be loaded, its message."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{run}: its newest checkpoint is of another kind: {error}") from None


def best(folder: Path) -> Path | None:
    """The checkpoint of the highest score, if one was marked and exists."""
    marked = _best(folder)
    return folder / f"step-{marked['step']:08d}.pt" if marked else None


def weights(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's state dict in a checkpoint. It changes no file, because a run may still be training.

    Args:
        expected: what it must fit, see `bvae.weights.difference`.

    Raises:
        UsageError: the file is damaged, or holds another model.
        OSError: it cannot be read.
    """
    try:
        found = _load(path, torch.device("cpu")).get("model")
    except Damaged as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: it holds no model")
    if reason := difference(found, expected):
        raise UsageError(f"{path} is not the model that its config.json describes: {reason}")
    return dict(found)


def versions() -> dict[str, str]:
    """The versions of the packages that determine a run's numbers, and of the C++ layers if it uses them."""
    result = {"torch": str(torch.__version__), "bvae": __version__}
    with contextlib.suppress(metadata.PackageNotFoundError):
        result["triton"] = metadata.version("triton")
    if library.loaded:
        result["layers"] = Path(library.loaded._name).stem  # names the source and the instruction set
    return result


def _load(path: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint's state. Raises Damaged; OSError if the file cannot be read at all."""
    try:
        data = read_bytes(path, WEIGHTS)
    except OSError as error:
        raise files.named(error, path) from None
    try:
        _verify(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that no checkpoint holds
            state = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except (Damaged, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # any type; torch's message is left out: it says how to run the file's code
        raise Damaged("it does not hold tensors and plain values alone") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] != _step(path):
        raise Damaged("it is not the state at the step in its name")
    return state


def _verify(data: bytes) -> None:
    """Compare every byte with its checksum: torch.save writes CRCs, and torch.load does not check them."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            entries = file.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise Damaged("torch.save did not write it")
            if sum(entry.file_size for entry in entries) > len(data):
                raise Damaged("it claims to be longer than it is")
            broken = file.testzip()
    except Damaged:
        raise
    except Exception:  # zipfile has no common exception type for damaged files
        raise Damaged("it is cut short or overwritten") from None
    if broken:
        raise Damaged(f"the checksum of {broken} is not the one that was written")


def _best(folder: Path) -> dict[str, Any] | None:
    """Step and score of the best checkpoint, if it exists."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        record = json.loads(read_bytes(folder / BEST, CONFIG))
        best = {"step": int(record["step"]), "score": float(record["score"])}
        if math.isfinite(best["score"]) and (folder / f"step-{best['step']:08d}.pt").is_file():
            return best
    return None


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _bytes(state: Any) -> int:
    """The size of all tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict | list | tuple):
        return sum(map(_bytes, state.values() if isinstance(state, dict) else state))
    return 0
