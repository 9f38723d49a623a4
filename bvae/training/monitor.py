"""Monitor a run: pass its numbers from the device to the log and to callbacks, and measure its speed."""

import resource
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from bvae.config import Config
from bvae.plots import progress_pictures
from bvae.training.log import NullLog, RunLog, Throughput
from bvae.training.profiler import Profile
from bvae.training.run import Run
from bvae.training.step import Scalars
from bvae.training.validation import Validation

SHOWN = 8  # held-out images of the log's pictures, always the same


class Callback(Protocol):
    """What `bvae.fit` calls during a run: on the host, on every rank, with numbers that have arrived.

    Each method is optional. If one returns True, the run stops after the step, with a checkpoint.
    """

    def on_start(self, config: Config, folder: Path | None, logged: Mapping[str, int]) -> bool | None:
        """Before the first step.

        Args:
            config: everything that the run depends on, resolved to numbers.
            folder: the run folder, or None if nothing is written.
            logged: of a resumed run, the last step logged so far of "train" and of "valid"; else 0, or empty.
        """

    def on_log(self, step: int, values: dict[str, float]) -> bool | None:
        """Every `log_every` steps: a step's losses, as in metrics.jsonl; on a GPU some steps later."""

    def on_validation(self, step: int, validation: Validation) -> bool | None:
        """After a validation."""

    def on_checkpoint(self, step: int, folder: Path | None) -> bool | None:
        """After a checkpoint; the run folder, or None if nothing is written."""

    def on_end(self, validation: Validation | None) -> bool | None:
        """After the last step, or after a stop (None)."""


class Monitor:
    """Monitors a run. Use it as a context around the training loop: leaving it closes the log."""

    def __init__(self, run: Run, callbacks: Sequence[Any] = (), profile: Profile | None = None) -> None:
        self._run, self._callbacks, self._profile = run, callbacks, profile
        self._first = run.done
        self._log = RunLog(run.out, run.steps, run.done) if run.distributed.is_main else NullLog()
        self.throughput = Throughput(run.config.training.batch_size)
        self.history: list[dict[str, Any]] = []  # every record of training and validation so far
        self.stop = False  # whether a callback has asked to stop

    def __enter__(self) -> "Monitor":
        self.throughput.start(self._run.done)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._log.close()
        if self._profile:
            self._profile.close()

    def start(self) -> None:
        """Report the start of the run."""
        self._call("on_start", self._run.config, self._run.out, self._log.logged)

    def step_done(self) -> None:
        """Count a step; log what has arrived from the device."""
        run, training = self._run, self._run.config.training
        self._log.advance()
        if self._profile:
            self._profile.step()
        if run.done == self._first + 1:
            self.throughput.start(run.done)  # the first step compiles
        if run.done % training.log_every == 0 or run.done == run.steps:
            self._receive(wait=True)
            run.step.metrics_buffer.send(run.done)
        self._receive(wait=False)

    def flush(self) -> None:
        """Log the rows that were sent, and check every step so far. Raises NotFinite."""
        self._receive(wait=True)
        self._run.step.metrics_buffer.send(self._run.done)
        self._run.step.receive(wait=True)
        self.throughput.reach(self._run.done)
        self._log.sync()  # the records up to a checkpoint are on the disk before it

    def checkpoint(self) -> None:
        """Report a checkpoint."""
        self._call("on_checkpoint", self._run.done, self._run.out)

    @property
    def is_validated(self) -> bool:
        """Whether the log has a validation of the step from which the run was resumed."""
        return self._log.is_validated

    def validation(self, result: Validation) -> None:
        """Log a validation."""
        run = self._run
        pictures = partial(_pictures, run, result)
        self._log.validation(run.done, run.epoch(run.done), result, pictures)
        self.history.append({"split": "valid", "step": run.done, **result._asdict()})
        self._call("on_validation", run.done, result)

    def resume(self) -> None:
        """Leave the time since `flush` out of the throughput."""
        self.throughput.start(self._run.done)

    def end(self, result: Validation | None) -> None:
        """Report the end of the run."""
        self._call("on_end", result)

    def _receive(self, wait: bool) -> None:
        scalars: Scalars | None = self._run.step.receive(wait)
        if scalars is None:
            return
        run, step = self._run, scalars.step
        self.throughput.reach(step)
        values, kl = run.metrics(scalars), {"kl_per_dim": scalars.kl_per_dim}
        self.history.append({"split": "train", "step": step, **values, **kl})
        values["images_per_s"] = round(self.throughput.images_per_s, 1)
        values["peak_memory_gib"] = round(peak_memory(run.step.device) / 2**30, 3)
        self._log.log(step, run.epoch(step), {**values, **kl}, run.config.training.batch_size)
        self._call("on_log", step, values)

    def _call(self, method: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            call: Callable[..., bool | None] | None = getattr(callback, method, None)
            if call is None:
                continue
            try:
                self.stop |= bool(call(*arguments))
            except BaseException:
                alone = self._run.distributed.world_size == 1
                if alone and self._run.done > self._first:  # the other ranks would not join this save
                    self._run.save(due=False)  # the callback failed, but the steps so far are kept
                raise


def peak_memory(device: torch.device) -> int:
    """The most memory that was in use at once so far, bytes: tensors on a GPU; on a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)  # the host's own count: nothing waits for the device
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _pictures(run: Run, result: Validation) -> Mapping[str, Any]:
    """Reconstructions and traversals of the first held-out images."""
    x = run.model.scale(run.valid.head(SHOWN).permute(0, 3, 1, 2))
    return progress_pictures(run.model, x, result.kl_per_dim)
