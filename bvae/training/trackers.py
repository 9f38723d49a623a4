"""Log a run to Weights & Biases or MLflow: callbacks of `bvae.fit`, and `bvae.train --log`."""

import dataclasses
import importlib
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bvae import files
from bvae.config import Config
from bvae.errors import UsageError, missing
from bvae.opening import TABLE, read_text
from bvae.training.log import Values, scalars
from bvae.training.validation import Validation

PICTURES = ("reconstructions.png", "samples.png", "traversals.png")  # of a finished run's folder


class Tracker(ABC):
    """A callback that sends what TensorBoard shows to a service, with the step as its x-axis.

    Rank 0 alone sends. If the service fails, one line says so, nothing more is sent, and training continues.
    The service's id of the run is kept in the run folder: a resumed run continues in the same one, without
    the steps that were sent before.

    Raises:
        ModuleNotFoundError: the service's package is not installed; the message says what to install.
    """

    package: str  # the module, and the name for --log

    def __init__(self) -> None:
        try:
            self._module: Any = importlib.import_module(self.package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(missing(error) or str(error), name=error.name) from None
        self._sends = False
        self._folder: Path | None = None
        self._logged: Mapping[str, int] = {}

    def on_start(self, config: Config, folder: Path | None, logged: Mapping[str, int]) -> None:
        self._sends = not dist.is_initialized() or dist.get_rank() == 0
        self._attempt(lambda: self._start(config, folder, logged))

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self._attempt(lambda: self._record("train", step, values))

    def on_validation(self, step: int, validation: Validation) -> None:
        self._attempt(lambda: self._record("valid", step, validation.values))

    def on_end(self, validation: Validation | None) -> None:
        self._attempt(lambda: self._end(validation))
        self._sends = False

    def _attempt(self, work: Callable[[], None]) -> None:
        """Do the work; any failure of the service ends the sending, not the training."""
        if not self._sends:
            return
        try:
            work()
        except Exception as error:
            self._sends = False
            reason = next(iter(str(error).splitlines()), "").rstrip(".")
            text = f"{self.package}: {type(error).__name__}: {reason}: training continues without it"
            print(text, file=sys.stderr, flush=True)

    def _start(self, config: Config, folder: Path | None, logged: Mapping[str, int]) -> None:
        self._folder = folder
        path = folder / f"{self.package}_id.txt" if folder else None
        old = read_text(path, TABLE).strip() if path and path.is_file() else None
        if old and not re.fullmatch(r"[\w-]{1,64}", old):
            raise UsageError(f"{path} holds no id of a run: remove it, and the next start is a new run there")
        self._logged = logged if old else {}
        new = self._open(old, folder, _flat(config))
        if path and new != old:
            files.write_text(path, f"{new}\n")

    def _record(self, split: str, step: int, values: Values) -> None:
        if step > self._logged.get(split, 0):
            curves = (scalars(f"{split}/{name}", value) for name, value in values.items())
            self._send(step, dict(chain.from_iterable(curves)))

    def _end(self, validation: Validation | None) -> None:
        if validation and self._folder:
            self._send_pictures([self._folder / name for name in PICTURES])
        self._close(finished=validation is not None)

    @abstractmethod
    def _open(self, old: str | None, folder: Path | None, config: Mapping[str, Any]) -> str:
        """Continue the service's run of the id `old`, or start one if that is None; return its id."""

    @abstractmethod
    def _send(self, step: int, values: dict[str, float]) -> None:
        """Send a step's values; do not wait for the network."""

    @abstractmethod
    def _send_pictures(self, pictures: list[Path]) -> None: ...

    @abstractmethod
    def _close(self, finished: bool) -> None:
        """Send the rest; `finished` is False if the run was stopped, and may be resumed."""


class WandbTracker(Tracker):
    """Logs to Weights & Biases.

    Args:
        options: of `wandb.init`, such as `project="faces", mode="offline"`. The project is "bvae" if neither
            they nor WANDB_PROJECT name one, and the run has its folder's name.

    Raises:
        ModuleNotFoundError: wandb is not installed; the message says what to install.

    Example: `bvae.fit(images, out="runs/mine", callbacks=[WandbTracker(project="faces")])`
    """

    package = "wandb"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = options

    def _open(self, old: str | None, folder: Path | None, config: Mapping[str, Any]) -> str:
        defaults = {
            "project": os.environ.get("WANDB_PROJECT") or "bvae",
            "name": folder.name if folder else None,
            "dir": folder,
            "reinit": "create_new",  # not the run that the process has open
        }
        more = {"id": old, "resume": "allow", "config": config, "allow_val_change": True}
        self._run = self._module.init(**{**defaults, **self._options, **more})
        # wandb's own counter of steps does not take a validation after training at the same step was resumed
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def _send(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def _send_pictures(self, pictures: list[Path]) -> None:
        self._run.log({path.stem: self._module.Image(str(path)) for path in pictures})

    def _close(self, finished: bool) -> None:
        self._run.finish()


class MlflowTracker(Tracker):
    """Logs to MLflow: to the server, and the experiment, that MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME
    name.

    Args:
        options: of `mlflow.start_run`, such as `experiment_id="3", nested=True`. The run has its folder's
            name.

    Raises:
        ModuleNotFoundError: mlflow is not installed; the message says what to install.

    Example: `bvae.fit(images, out="runs/mine", callbacks=[MlflowTracker()])`
    """

    package = "mlflow"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = options
        self._sent: Any = None  # the last values, on their way

    def _open(self, old: str | None, folder: Path | None, config: Mapping[str, Any]) -> str:
        options = {"run_name": folder.name if folder and not old else None, **self._options, "run_id": old}
        run_id = str(self._module.start_run(**options).info.run_id)
        if not old:  # MLflow refuses a parameter's second value
            self._module.log_params(config)
        return run_id

    def _send(self, step: int, values: dict[str, float]) -> None:
        self._sent = self._module.log_metrics(values, step=step, synchronous=False)

    def _send_pictures(self, pictures: list[Path]) -> None:
        for path in pictures:
            self._module.log_artifact(str(path))

    def _close(self, finished: bool) -> None:
        if self._sent:
            self._sent.wait()  # raises what went wrong on the way
        self._module.end_run("FINISHED" if finished else "KILLED")


TRACKERS: dict[str, type[WandbTracker] | type[MlflowTracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


def _flat(config: Config) -> dict[str, Any]:
    """The configuration as "section.option" and plain values."""
    return {
        f"{section}.{name}": value if isinstance(value, bool | int | float) else str(value)
        for section, options in dataclasses.asdict(config).items()
        for name, value in options.items()
    }
