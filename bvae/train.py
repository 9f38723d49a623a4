"""Train a beta-VAE.

  python -m bvae.train                                    drawn faces; on a CPU a preset of under 4 minutes
  python -m bvae.train --data celeba --data-root DIR --amp
  python -m bvae.train --data folder --data-root DIR --loss-type H --beta 4
  python -m bvae.train --config bbvae.yaml                PyTorch-VAE's configurations run as written
  python -m bvae.train --resume runs/NAME                 continue after Ctrl-C or a crash
  torchrun --nproc-per-node 8 -m bvae.train --batch-size 1152 ...    on eight GPUs, 144 images each per step

Results are in runs/NAME: traversals.gif, model.safetensors, metrics.jsonl and more.
"""

import contextlib
import shlex
import shutil
import sys
import time
from pathlib import Path

from bvae.errors import missing, needs_train_extra

with needs_train_extra(__name__):
    from bvae.plots import save_pictures
    from bvae.reference import scale_pixels
    from bvae.training import checkpoint, nan_debug
    from bvae.training.cli import parse
    from bvae.training.distributed import exit_process, lost_connection, rank_suffix, silence_other_ranks
    from bvae.training.log import NullLog, RunLog, Throughput
    from bvae.training.profiler import Profile, name_kernels
    from bvae.training.run import Run, prepare
    from bvae.training.signals import StopRequest
    from bvae.training.step import NotFinite, Scalars
    from bvae.training.validation import Validation, validate

SHOWN = 3  # images of a batch that are named on the screen
PAUSE = 10  # seconds: what a checkpoint and a validation take must stay a small part of the time


def train(run: Run, stop: StopRequest, profile: Profile | None = None) -> tuple[Validation, float] | None:
    """Train to the end: the last validation and the images a second. After a request to stop: None.

    Either way the last step is in a checkpoint.

    Raises:
        NotFinite: the loss or a gradient is not; the message names the step.
        KeyboardInterrupt: a request to stop when there was nothing to save.
        OSError: the run folder cannot be written.
    """
    training, per_epoch, distributed = run.config.training, len(run.train), run.distributed
    report = RunLog(run.out, run.steps, run.done) if distributed.is_main else NullLog()
    speed = Throughput(training.batch_size)
    first, saved = run.done, time.monotonic()
    # The processes must stop at the same step, and asking makes a host wait for its device's peers.
    asking = 1 if run.step.device.type == "cpu" else training.log_every
    result: Validation | None = None

    def epoch(step: int) -> int:
        return (step - 1) // per_epoch + 1

    def note(scalars: Scalars | None) -> None:
        """Log what has come from the device."""
        if scalars is None:
            return
        speed.reach(scalars.step)
        values, step = run.metrics(scalars), scalars.step
        report.log(step, epoch(step), values, speed.images_per_s, training.batch_size)

    def is_due() -> bool:
        """Whether a checkpoint and a validation follow this step."""
        if run.done == run.steps:
            return True
        if training.checkpoint_every:
            return run.done % training.checkpoint_every == 0
        return run.done % per_epoch == 0 and distributed.broadcast(time.monotonic() - saved > PAUSE)

    def keep(with_validation: bool) -> None:
        """Write a checkpoint, then validate."""
        nonlocal saved, result
        note(run.step.receive(wait=True))
        run.step.metrics_buffer.send(run.done)
        run.step.receive(wait=True)  # raises if a loss since the last log is not finite
        speed.reach(run.done)
        run.synchronize()
        run.save()
        if with_validation:
            stop.at_once = distributed.world_size == 1  # the others would wait for this process
            result = validate(run.model, run.loss, run.valid, training.seed, run.step.dtype, distributed)
            report.validation(run.done, epoch(run.done), result)
            run.rate(result)
            stop.at_once = False
        saved = time.monotonic()
        speed.start(run.done)

    try:
        speed.start(run.done)
        stopping = False
        while run.done < run.steps and not stopping:
            for images in run.batches():
                run.advance(images)
                report.advance()
                if profile:
                    profile.step()
                if run.done == first + 1:
                    speed.start(run.done)  # the first step compiles
                    stop.at_once = False
                if run.done % training.log_every == 0 or run.done == run.steps:
                    note(run.step.receive(wait=True))
                    run.step.metrics_buffer.send(run.done)
                note(run.step.receive(wait=False))
                due = is_due()
                stopping = run.done % asking == 0 and distributed.any_rank(stop.signal is not None)
                if due or stopping:
                    keep(with_validation=due)
                if stopping or run.done == run.steps:
                    break
        if run.done < run.steps:
            return None
        if result is None:  # resumed after its last step
            keep(with_validation=True)
        assert result
        return result, speed.images_per_s
    finally:
        stop.at_once = True
        report.close()
        if profile:
            profile.close()


def finish(run: Run, result: Validation, images_per_s: float) -> None:
    """Write the model and the pictures, and say what came out and where it is."""
    run.model.save_pretrained(run.out)
    first = run.valid.head(32).permute(0, 3, 1, 2)
    save_pictures(run.model, scale_pixels(first, run.loss.pixel_range[0]), result.kl_per_dim, run.out)
    print(f"explained variance: {result.explained_variance:.2f}")
    print(f"validation: MSE {result.mse:.4f} per pixel, KL {result.kld:.2f} nats per image")
    if images_per_s:  # a finished run that is resumed trains no more
        print(f"speed: {images_per_s:.0f} images/s in training")
    print(f"results: {run.out}/ (see traversals.gif, traversals.png, reconstructions.png, samples.png)")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or stopped on request, 1 the run failed, 2 it could not start as asked for.

    130: stopped on request before there was a checkpoint.
    """
    silence_other_ranks()
    with StopRequest() as stop:
        return _main(sys.argv[1:] if argv is None else argv, stop)


def _main(argv: list[str], stop: StopRequest) -> int:
    out: Path | None = None  # until the run is ready
    resumed: Path | None = None
    run: Run | None = None
    try:
        arguments = parse(argv, __doc__)
        resumed = arguments.resume
        if arguments.profile:
            name_kernels()
        run = prepare(arguments)
        out = run.out
        if arguments.debug_nan:
            print(nan_debug.find(run) or f"every number up to step {run.done} is finite")
            return 0
        profiled = arguments.profile and run.distributed.is_main
        outcome = train(run, stop, Profile(out, run.step.device) if profiled else None)
        if not outcome:
            print(f"stopped at step {run.done} of {run.steps}. {_go_on(out)}")
        elif run.distributed.is_main:
            finish(run, *outcome)
        run.leave()
        return 0
    except KeyboardInterrupt:
        left = out or resumed
        print(f"stopped. {_go_on(left)}", flush=True)
        return 0 if left and checkpoint.checkpoints(left / checkpoint.FOLDER) else 130
    except NotFinite as error:
        assert run
        _complain(f"{error}{_batch(run, error.step)}. A lower --lr may help. {_go_on(out)}")
    except OSError as error:
        _complain(f"{error}{_room(error, out)}. {_go_on(out)}" if out else str(error))
        return 2 if out is None and error.errno not in checkpoint.FULL else 1
    except RuntimeError as error:
        if "alloc" in str(error) or "out of memory" in str(error):
            _complain(f"out of memory: {str(error).splitlines()[0]}")
            print("a smaller --batch-size or --hidden-dims needs less", file=sys.stderr)
        elif lost_connection(error):
            _complain(f"another process has ended: its message says why. {_go_on(out)}")
        else:
            raise
    except ModuleNotFoundError as error:
        _complain(missing(error))
        return 2
    except ValueError as error:
        if out:
            raise  # not the user's input: a bug, to be seen whole
        _complain(str(error))
        return 2
    return 1


def _room(error: OSError, out: Path) -> str:
    """What is left of a disk that is full, unless the error says so."""
    if error.errno not in checkpoint.FULL or "are free" in str(error):
        return ""
    return f": {shutil.disk_usage(out).free:,} bytes are free"


def _batch(run: Run, step: int) -> str:
    """Which images a step saw: some of them, and the file with all."""
    images, path = run.images(step), run.out / f"batch-{step}.txt"
    with contextlib.suppress(OSError):
        path.write_text("\n".join([*images, ""]), encoding="utf-8", errors="surrogateescape")
    return f", on {', '.join(images[:SHOWN])} and {len(images) - SHOWN} more (all are in {path})"


def _complain(text: str) -> None:
    print(f"error{rank_suffix()}: {text}", file=sys.stderr)


def _go_on(out: Path | None) -> str:
    """What to do with what a run has left."""
    found = checkpoint.checkpoints(out / checkpoint.FOLDER) if out else []
    if not found:
        return "No checkpoint was written"
    command = shlex.join([sys.executable, "-m", "bvae.train", "--resume", str(out)])
    return f"The last good checkpoint is {found[-1].name}; go on with: {command}"


if __name__ == "__main__":
    exit_process(main())
