"""A run's state on disk: written whole or not at all, read without pickle."""

import os
from pathlib import Path
from typing import Any

import torch

FOLDER = "checkpoints"  # in the run folder
KEPT = 2  # the newest, and the one before it


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `step-<step>.pt` atomically and drop all but the newest `KEPT`.

    The file is complete before it gets its name, so that a crash or a full disk leaves the ones before.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    unfinished = path.with_suffix(".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch.save hides ENOSPC behind a RuntimeError of its own
        raise
    for old in checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load_newest(folder: Path, device: torch.device) -> dict[str, Any]:
    """The newest checkpoint's state, its tensors on the device.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: the file is damaged.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint: the run stopped before its first one; start it anew"
        )
    try:
        return torch.load(found[-1], map_location=device, weights_only=True)
    except Exception as error:  # torch.load has no common exception type for damaged files
        before = f"; remove it to go on from {found[-2].name}" if len(found) > 1 else ""
        raise ValueError(f"{found[-1]} is damaged ({str(error).splitlines()[0]}){before}") from None
