"""The log of a run while it trains: a progress bar or lines, metrics.jsonl and TensorBoard."""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from bvae import files
from bvae.errors import say_once
from bvae.training.records import METRICS, read_records
from bvae.training.validation import ACTIVE_KL, Validation

if TYPE_CHECKING:
    from PIL.Image import Image

Values = Mapping[str, float | list[float]]
EVENTS = "events.out.tfevents.*"  # TensorBoard's files
Pictures = Callable[[], Mapping[str, "Image"]]  # by name, drawn when they are asked for


class RunLog:
    """Progress of a run: a live bar on a terminal, else a line per `log`; records in the run folder.

    Args:
        out: the run folder. None: nothing is written.
        steps, done: all steps of the run, and those before this log.
    """

    def __init__(self, out: Path | None, steps: int, done: int) -> None:
        self._steps, self._done = steps, done
        self._records = _Records(out, done) if out else None
        self._bar = tqdm(
            total=steps,
            initial=done,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{bar:4} step {n}/{total} ETA {remaining}{postfix}",  # fits 80 columns
        )

    def advance(self) -> None:
        """Count one step."""
        self._bar.update()

    def log(self, step: int, epoch: int, values: Mapping[str, Any], batch_size: int) -> None:
        """Write one record of training; values are numbers, and "kl_per_dim" a list of them."""
        shown = f"loss {values['loss']:.3g} KL {values['kld']:.1f} C {values['capacity']:.1f}"
        self.log_shown(step, epoch, values, shown, batch_size)

    def log_shown(
        self, step: int, epoch: int, values: Mapping[str, Any], shown: str, batch_size: int
    ) -> None:
        """As `log`, with the text of the line: for values of another kind, with "images_per_s" among them."""
        self._write("train", step, epoch, values)
        images_per_s = values["images_per_s"]
        shown = f"epoch {epoch} {shown} {images_per_s:.0f} images/s"
        self._bar.set_postfix_str(shown)
        if self._bar.disable:
            eta = (self._steps - step) * batch_size / images_per_s if images_per_s else 0
            self.line(f"step {step}/{self._steps}, ETA {timedelta(seconds=round(eta))}, {shown}")

    @property
    def is_validated(self) -> bool:
        """Whether there was a record of a validation of the step `done` at the start."""
        return self._records is not None and self._records.validated

    @property
    def logged(self) -> Mapping[str, int]:
        """The last step of each split that the log had at the start; a killed run's may be after `done`."""
        return self._records.logged if self._records else {}

    def validation(self, step: int, epoch: int, result: Validation, pictures: Pictures) -> None:
        """Write one record of validation, and pictures for TensorBoard, unless there is one."""
        if not (step == self._done and self.is_validated):  # else a finished run is resumed
            self._write("valid", step, epoch, result.values)
            if self._records:
                self._records.add_images("valid", step, pictures)
            self.sync()
        self.line(
            f"epoch {epoch}: validation mse {result.mse:.4f}, KL {result.kld:.2f} nats, "
            f"explained variance {result.explained_variance:.2f}"
        )

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def sync(self) -> None:
        """Write all records to the disk. Raises OSError."""
        if self._records:
            self._records.sync()

    def close(self) -> None:
        """Write the rest and close. Raises OSError if it cannot be written."""
        self._bar.close()
        if self._records:
            self._records.close()

    def _write(self, split: str, step: int, epoch: int, values: Values) -> None:
        if self._records:
            self._records.write(split, step, epoch, values)


class _Records:
    """metrics.jsonl and TensorBoard's events in a run folder."""

    def __init__(self, out: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second

        self._path = out / METRICS
        self.validated, self.logged = _start(self._path, done)
        self._metrics = files.append_text(self._path)
        events = set(out.glob(EVENTS))
        # TensorBoard's thread passes its error to the next writer, so it should not print it too.
        self._before, threading.excepthook = threading.excepthook, self._unhandled
        self._tensorboard: SummaryWriter | None = None
        try:
            self._tensorboard = SummaryWriter(str(out), purge_step=done + 1)
        except UnicodeEncodeError:
            say_once(
                f"{out}: TensorBoard cannot write into a folder whose name is not UTF-8: it gets no events"
            )
        self._events = set(out.glob(EVENTS)) - events

    def write(self, split: str, step: int, epoch: int, values: Values) -> None:
        record = {"split": split, "step": step, "epoch": epoch}
        record.update({name: _for_json(value) for name, value in values.items()})
        try:
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
            if self._tensorboard:
                for name, value in values.items():
                    for tag, number in scalars(f"{split}/{name}", value):
                        self._tensorboard.add_scalar(tag, number, step)
        except OSError as error:
            raise files.named(error, self._path) from None

    def add_images(self, split: str, step: int, pictures: Pictures) -> None:
        if not self._tensorboard:
            return
        try:
            for name, picture in pictures().items():
                self._tensorboard.add_image(f"{split}/{name}", np.asarray(picture), step, dataformats="HWC")
        except OSError as error:
            raise files.named(error, self._path) from None

    def sync(self) -> None:
        try:
            if self._tensorboard:
                self._tensorboard.flush()
            for path in (self._path, *self._events):
                with contextlib.suppress(FileNotFoundError):  # its user has removed it
                    files.sync(path)
        except OSError as error:
            raise files.named(error, self._path) from None

    def close(self) -> None:
        try:
            self._metrics.close()
            if self._tensorboard:
                self._tensorboard.close()
        finally:
            threading.excepthook = self._before

    def _unhandled(self, error: threading.ExceptHookArgs) -> None:
        if not isinstance(error.exc_value, OSError):
            self._before(error)


class Throughput:
    """Images per second of the training steps alone, without compilation, validation and checkpoints."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._steps, self._seconds = 0, 0.0
        self._step, self._since = 0, time.perf_counter()

    def start(self, step: int) -> None:
        """Leave out the time since the last call, which was not training; `step` steps are done."""
        self._step, self._since = step, time.perf_counter()

    def reach(self, step: int) -> None:
        """Count the time since the last call as training up to this step, which the device has finished."""
        now = time.perf_counter()
        self._steps, self._seconds = self._steps + step - self._step, self._seconds + now - self._since
        self._step, self._since = step, now

    @property
    def images_per_s(self) -> float:
        return self._steps * self._batch_size / self._seconds if self._seconds else 0.0


class NullLog:
    """A `RunLog` that writes nothing, for all ranks but 0."""

    is_validated = False
    logged: Mapping[str, int] = {}

    def advance(self) -> None: ...

    def log(self, *_: object) -> None: ...

    def validation(self, *_: object) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def _start(path: Path, done: int) -> tuple[bool, dict[str, int]]:
    """Keep the records up to the checkpoint's step, because a resumed run writes the later ones again.

    Returns whether one of them is of a validation of that step, and the last step of each split, kept or not.
    """
    lines, validated, last = [], False, {"train": 0, "valid": 0}
    for line, record in read_records(path):
        split = record.get("split")
        if split in last:
            last[split] = max(last[split], record["step"])
        if record["step"] <= done:
            lines.append(line + "\n")
            validated |= record["step"] == done and split == "valid"
    files.write_text(path, "".join(lines))
    return validated, last


def _for_json(value: float | list[float]) -> float | list[float | None] | None:
    """JSON has no NaN and no infinity: None. Four digits of a list's numbers keep the log small."""
    if isinstance(value, list):
        return [float(f"{each:.4g}") if math.isfinite(each) else None for each in value]
    return value if math.isfinite(value) else None


def scalars(tag: str, value: float | list[float]) -> Iterator[tuple[str, float]]:
    """The curves of a value: of a list, one for each latent, from when it is active."""
    if isinstance(value, list):
        yield from ((f"{tag}/{i:03}", each) for i, each in enumerate(value) if each > ACTIVE_KL)
    else:
        yield tag, value
