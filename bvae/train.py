"""Train a beta-VAE.

  python -m bvae.train                                    drawn faces; on a CPU a preset of under 4 minutes
  python -m bvae.train --data celeba --data-root DIR --amp
  python -m bvae.train --data folder --data-root DIR --loss-type H --beta 4
  python -m bvae.train --config bbvae.yaml                PyTorch-VAE's configurations run as written
  python -m bvae.train --resume runs/NAME                 go on after Ctrl-C or a crash

Results are in runs/NAME: traversals.gif, model.safetensors, metrics.jsonl and more.
"""

import errno
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from bvae import checkpoint
from bvae.arguments import parse
from bvae.reference import scale_pixels
from bvae.report import Report, save_pictures
from bvae.run import Run, prepare
from bvae.validation import Validation, validate


class StopRequest:
    """Remembers Ctrl-C and SIGTERM until the step is done; a second one acts as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Speed:
    """Images a second of the training steps alone, without validation, checkpoints and pictures."""

    def __init__(self) -> None:
        self.images, self.seconds, self._since = 0, 0.0, time.perf_counter()

    def start(self) -> None:
        """What happened since the last call was not training."""
        self._since = time.perf_counter()

    def count(self, images: int) -> None:
        """What happened since the last call was training on so many images."""
        now = time.perf_counter()
        self.images, self.seconds, self._since = self.images + images, self.seconds + now - self._since, now

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def train(run: Run) -> tuple[Validation, float] | None:
    """Train to the end: the last validation and the images a second. After Ctrl-C or SIGTERM: None.

    Either way the last step is in a checkpoint.

    Raises:
        FloatingPointError: the loss is not finite; the message names the step.
        OSError: the run folder cannot be written.
    """
    training, per_epoch = run.config.training, len(run.train)
    report, stop, speed = Report(run.out, run.steps, run.done), StopRequest(), Speed()
    first = run.done

    def epoch() -> int:
        return (run.done - 1) // per_epoch + 1

    try:
        while True:
            speed.start()
            for images, _ in run.train.epoch(*divmod(run.done, per_epoch)):
                if stop.signal or run.done == run.steps:
                    break
                run.advance(images)
                report.advance()
                if run.done == first + 1:
                    speed.start()  # the first step compiles
                else:
                    speed.count(training.batch_size)
                if run.done % training.log_every == 0 or run.done == run.steps:
                    report.log(run.done, epoch(), run.metrics(), speed.images_per_s, training.batch_size)
            run.step.read(run.done)  # waits for the device
            speed.count(0)
            run.save()
            if run.done % per_epoch == 0 or run.done == run.steps:
                result = validate(run.model, run.loss, run.valid, training.seed, run.step.dtype)
                report.validation(run.done, epoch(), result)
            if run.done == run.steps:
                return result, speed.images_per_s
            if stop.signal:
                return None
    finally:
        stop.restore()
        report.close()


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
    """Exit status: 0 done or stopped on request, 1 the run failed, 2 it could not start as asked for."""
    out: Path | None = None  # until the run is ready
    try:
        run = prepare(parse(sys.argv[1:] if argv is None else argv, __doc__))
        out = run.out
        outcome = train(run)
        if outcome:
            finish(run, *outcome)
        else:
            print(f"stopped at step {run.done} of {run.steps}. {_go_on(out)}")
        return 0
    except KeyboardInterrupt:
        print(f"stopped. {_go_on(out)}", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"error: {error}. A lower --lr may help. {_go_on(out)}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}. {_go_on(out)}" if out else f"error: {error}", file=sys.stderr)
        return 2 if out is None and error.errno != errno.ENOSPC else 1
    except RuntimeError as error:
        if "alloc" not in str(error) and "out of memory" not in str(error):
            raise
        print(f"error: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        print("a smaller --batch-size or --hidden-dims needs less", file=sys.stderr)
    except ValueError as error:
        if out:
            raise  # not the user's input: a bug, to be seen whole
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1


def _go_on(out: Path | None) -> str:
    """What to do with what a run has left."""
    found = checkpoint.checkpoints(out / checkpoint.FOLDER) if out else []
    if not found:
        return "No checkpoint was written"
    command = shlex.join([sys.executable, "-m", "bvae.train", "--resume", str(out)])
    return f"The last good checkpoint is {found[-1].name}; go on with: {command}"


if __name__ == "__main__":
    sys.exit(main())
