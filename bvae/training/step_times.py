"""The times of a captured step with the compiler's and with our kernels: raced once, kept in the cache."""

import contextlib
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bvae import files
from bvae.errors import say_once
from bvae.kernels import launch
from bvae.opening import CONFIG, open_regular
from bvae.pipelines.cache_folder import default_folder
from bvae.training import checkpoint
from bvae.training.run import Run

ROUNDS = 30  # replays of each
GAIN = 1.02  # how many times as fast our kernels must make the step: less is within the noise


class StepTimes(NamedTuple):
    """Milliseconds per step: the medians of a race.

    >>> StepTimes(compiler=0.51, ours=0.5).choice
    'ours'
    >>> StepTimes(compiler=0.5, ours=0.5).choice
    'compiler'
    """

    compiler: float
    ours: float

    @property
    def choice(self) -> str:
        """The kernels to use, "compiler" or "ours"."""
        return "ours" if self.compiler >= GAIN * self.ours else "compiler"


class DeviceClock:
    """The GPU's own clock. A mark is queued like a kernel; only reading it makes the host wait."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)


def race(compiler: Callable[[], None], ours: Callable[[], None], clock: DeviceClock) -> StepTimes:
    """Replay both steps in turn. Who goes first changes too, so that a drift affects both alike."""
    replays = compiler, ours
    spans: tuple[list[tuple[torch.cuda.Event, torch.cuda.Event]], ...] = ([], [])
    for number in range(ROUNDS):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            start = clock.mark()
            replays[which]()
            spans[which].append((start, clock.mark()))
    # Read when all are queued: the device never waits for the host between two steps.
    return StepTimes(*(statistics.median(clock.milliseconds(*span) for span in each) for each in spans))


class Record:
    """The times of a run's step in the cache folder: a file for each set of what they depend on.

    A file that is damaged or another user's counts as none. One that cannot be written takes a line.
    """

    def __init__(self, run: Run) -> None:
        self.key = _key(run)
        self._folder = run.config.data.cache_dir

    def read(self) -> StepTimes | None:
        """The times of an earlier race, if there are any."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
            with open_regular(self._path(), CONFIG) as file:
                owner = os.fstat(file.fileno()).st_uid
                if owner != 0 and owner != os.getuid():  # 0: the administrator, or Windows
                    return None
                record = json.loads(file.read())
            times = StepTimes(float(record["compiler_ms"]), float(record["ours_ms"]))
            if record["key"] == self.key and all(0 < each < math.inf for each in times):
                return times
        return None

    def write(self, times: StepTimes) -> None:
        """Keep the times for later starts."""
        record = {"key": self.key, "compiler_ms": times.compiler, "ours_ms": times.ours}
        try:
            path = self._path()
            files.make_folder(path.parent)
            files.write_text(path, json.dumps(record, indent=2))
        except (OSError, ValueError) as error:
            say_once(f"the next start times the network's kernels again: {error}")

    def _path(self) -> Path:
        """Raises UsageError, OSError: there is no cache folder."""
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return (self._folder or default_folder()) / f"network-kernels-{digest[:16]}.json"


def _key(run: Run) -> dict[str, str]:
    """What the times depend on, by name."""
    training, objective = run.config.training, run.config.objective
    sources = hashlib.sha256()
    for path in sorted(Path(launch.__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    return {
        **run.conditions,  # the GPU, and the number of processes
        **checkpoint.versions(),
        "kernels": sources.hexdigest()[:16],
        "model": json.dumps(run.model.config),
        "batch": f"{run.train.batch_size} images in {training.accumulate} parts",
        "dtype": str(run.step.dtype),
        "objective": " ".join(
            (type(run.loss).__name__, objective.loss_type, objective.likelihood, objective.recon)
        ),
        "optimizer": training.optimizer,
        "compile": str(run.step.compile),
        "deterministic": str(training.deterministic),
    }
