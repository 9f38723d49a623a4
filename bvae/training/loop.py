"""The training loop."""

from bvae.training.monitor import Monitor
from bvae.training.run import Run
from bvae.training.signals import StopRequest
from bvae.training.validation import Validation


def train(run: Run, monitor: Monitor, stop: StopRequest) -> Validation | None:
    """Train to the end, or until a callback stops the run, and return the last validation.

    Returns None if a signal stopped the run. In every case the last step is in a checkpoint. A validation
    that was stopped is made up for when the run is resumed, before any further step.

    Raises:
        NotFinite: a loss or a gradient is NaN or infinite; the message names the step.
        KeyboardInterrupt: a request to stop before the first step is done.
        OSError: the run folder cannot be written.
    """
    result: Validation | None = None
    monitor.start()
    if run.due and not run.distributed.broadcast(monitor.is_validated):
        result = _validate(run, monitor, stop)
        if result is None:
            return None
    for images in run.batches():
        result = None
        run.advance(images)
        monitor.step_done()
        stop.interrupt_now = False
        due, stopping = run.is_due(), _stops(run, monitor, stop)
        if due or stopping:
            validating = due or monitor.stop
            result = _save(run, monitor, stop, validating)
            if validating and result is None:
                return None
            monitor.stop = run.distributed.any_rank(monitor.stop)  # a callback of the validation asks for it
        if stopping or monitor.stop:
            break
    stop.interrupt_now = True
    if run.done < run.steps and not monitor.stop:
        return None
    return result or _save(run, monitor, stop, validating=True)  # no result if resumed after the last step


def _stops(run: Run, monitor: Monitor, stop: StopRequest) -> bool:
    """Whether a callback or a signal asks any rank to stop."""
    # These all-reduces block the host, so with a GPU they are done every `log_every` steps only.
    every = 1 if run.step.device.type == "cpu" else run.config.training.log_every
    if run.done % every:
        return False
    monitor.stop = run.distributed.any_rank(monitor.stop)
    return monitor.stop or run.distributed.any_rank(stop.signal is not None)


def _save(run: Run, monitor: Monitor, stop: StopRequest, validating: bool) -> Validation | None:
    """Write a checkpoint, then validate."""
    monitor.flush()  # raises if a loss since the last log is not finite
    run.save(due=validating)
    monitor.checkpoint()
    result = _validate(run, monitor, stop) if validating else None
    monitor.resume()
    return result


def _validate(run: Run, monitor: Monitor, stop: StopRequest) -> Validation | None:
    """Validate, and rate the checkpoint; None if a signal asks to stop first."""
    alone = run.distributed.world_size == 1  # other ranks would wait for this one
    if alone and stop.signal is not None and run.done < run.steps:
        return None
    stop.interrupt_now = alone
    try:
        result = run.validate()
    except KeyboardInterrupt:
        if stop.signal is None:
            raise
        return None
    finally:
        stop.interrupt_now = False
    run.mark_best(result)  # before the record, after which the checkpoint counts as rated
    monitor.validation(result)
    return result
