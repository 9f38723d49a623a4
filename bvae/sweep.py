"""Train a preset on a grid of values with several seeds, evaluate every model, and plot the results.

  python -m bvae.sweep locatello_sprites_beta4 --grid beta=1,4 --seeds 5
  python -m bvae.sweep --baselines      scores of codes without training, and the beta-VAE paper's figures

Options that are not listed here are passed to bvae.train (--max-steps 2000). The same command again continues
where it was stopped. Its folder holds sweep.md, sweep.png and a run folder for each model.
"""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from bvae import files
from bvae.errors import UsageError, exit_status, needs_train_extra

with needs_train_extra(__name__):
    import tyro

    from bvae import config, train
    from bvae.config import SHAPES, Config
    from bvae.device import choose_device
    from bvae.evaluation import baselines, run_folder, sweep_report
    from bvae.evaluation.measure import Protocol
    from bvae.training import checkpoint
    from bvae.training.cli import parse

BASELINES = "baselines.json"
BINS = 20  # of the metrics, which need at least as many points
SETTINGS = "sweep.yaml"  # the options that all runs share


@dataclass(frozen=True)
class Arguments:
    """What to train, and with how many points and seeds to measure it."""

    preset: Annotated[str | None, tyro.conf.arg(name="PRESET"), tyro.conf.Positional] = None
    """A preset's name or a YAML file, as for --config of bvae.train."""
    grid: str | None = None
    """An option of bvae.train and its values: beta=1,4."""
    seeds: int = 5
    """Runs of each value, with training seeds 0, 1, ..."""
    baselines: bool = False
    """Measure codes that need no training, and nothing else."""
    metric_seeds: int = 1
    """How many times each metric draws new points; the spread shown is that of the runs."""
    points: int = 10_000
    """Points that the metrics' estimators are trained on, as for bvae.evaluate."""
    out: Path | None = None
    """Folder of the sweep. None: runs/sweep-<preset>, or runs/baselines."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    def check(self) -> None:
        """Raise ValueError for the first option that cannot be used."""
        if not self.baselines and (self.preset is None or self.grid is None):
            raise UsageError(
                "name a preset and a grid (locatello_sprites_beta4 --grid beta=1,4), or --baselines"
            )
        if self.baselines and self.grid:
            raise UsageError(f"--baselines trains nothing: --grid {self.grid} has no effect")
        for name, least in (("seeds", 1), ("metric_seeds", 1), ("points", BINS)):
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} must be at least {least}, got {getattr(self, name)}")


class Job(NamedTuple):
    """One run of the sweep."""

    value: str  # of the grid
    out: Path
    command: list[str]  # of bvae.train, from the beginning
    config: Config


def plan(arguments: Arguments, out: Path, others: Sequence[str]) -> tuple[str, list[Job]]:
    """The grid's key, and the runs.

    Raises:
        ValueError: a grid without effect, or values that bvae.train does not take.
        SystemExit: options that cannot be read.
    """
    key, equals, text = (arguments.grid or "").partition("=")
    values = [value.strip() for value in text.split(",")]
    if not (key and equals and all(values)) or len(set(values)) < len(values):
        raise UsageError(
            f"--grid must be an option and different values, as beta=1,4, got {arguments.grid!r}"
        )
    jobs = []
    for value in values:
        for seed in range(arguments.seeds):
            run = out / f"{key}-{value}-seed-{seed}"
            command = [
                *("--config", str(arguments.preset), "--device", arguments.device, *others),
                *(f"--{key.replace('_', '-')}", value, "--seed", str(seed), "--out", str(run)),
            ]
            jobs.append(Job(value, run, command, _settings(command)))
    first = jobs[0].config
    if key == "beta" and first.objective.loss_type != "H":
        raise UsageError(
            f"beta has no effect on {arguments.preset}'s loss {first.objective.loss_type}: add --loss-type H"
        )
    configs = [job.config for job in jobs[:: arguments.seeds]]
    if any(config in configs[:i] for i, config in enumerate(configs)):
        raise UsageError(f"--grid {arguments.grid}: two of the values make no difference")
    if first.data.name == "folder":
        raise UsageError("a sweep measures disentanglement, and a folder's images have no known factors")
    return key, jobs


def _settings(command: list[str]) -> Config:
    """The configuration that bvae.train would run."""
    with contextlib.redirect_stdout(io.StringIO()):  # the run prints its notes again
        return parse(command, train.__doc__ or "").settings


def check_same(file: Path, wanted: Config) -> None:
    """Raise ValueError if the sweep in the folder is of another configuration."""
    if not file.is_file():
        return
    existing = config.read(file)[0]
    for section in vars(wanted):
        old, new = (vars(getattr(each, section)) for each in (existing, wanted))
        for name, value in new.items():
            if old[name] != value:
                raise UsageError(
                    f"{file.parent} holds a sweep with {section}.{name} {old[name]} instead of {value}: name "
                    "another folder with --out"
                )


# --- One run ----------------------------------------------------------------------------------------------
def is_trained(run: Path) -> bool:
    """Whether training has finished: the pictures are written last."""
    return (run / "traversals.gif").is_file()


def read_evaluation(run: Path, arguments: Arguments) -> dict[str, Any] | None:
    """The result of bvae.evaluate with the same seeds and points, if there is one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        result = json.loads((run / "evaluation.json").read_text())
        if (result["seeds"], result["points"]) == (arguments.metric_seeds, arguments.points):
            return result
    return None


def train_and_evaluate(job: Job, arguments: Arguments) -> int:
    """Do the unfinished part of a run; return the exit status of the failure, or 0."""
    if not is_trained(job.out):
        command = job.command
        if checkpoint.checkpoints(job.out / checkpoint.FOLDER):
            command = ["--resume", str(job.out), "--device", arguments.device]
        elif job.out.exists():  # stopped before its first checkpoint
            shutil.rmtree(job.out)
        status = train.main(command)
        if status or not is_trained(job.out):
            return status or 130  # stopped, with a checkpoint
    protocol = Protocol(seeds=arguments.metric_seeds, points=arguments.points, device=arguments.device)
    return exit_status(lambda: print(run_folder.evaluate(job.out, protocol), end=""))


def _run_process(job: Job, arguments: Arguments) -> None:
    """Run `train_and_evaluate` as a process. Only the sweep gets Ctrl-C, and passes it on."""
    os.setpgid(0, 0)
    sys.exit(train_and_evaluate(job, arguments))


def in_its_own_process(job: Job, arguments: Arguments) -> int:
    """Run a job in a process, so that a crash does not end the sweep. Returns its exit status or -signal.

    Raises:
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGUSR1, after the run has written its checkpoint.
    """
    process = multiprocessing.get_context("spawn").Process(target=_run_process, args=(job, arguments))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()
        process.join()
        raise
    assert process.exitcode is not None
    return process.exitcode


# --- All of them ------------------------------------------------------------------------------------------
def sweep(arguments: Arguments, others: Sequence[str]) -> int:
    """Train and evaluate the unfinished runs, and report; return 1 if a run failed."""
    arguments.check()
    if arguments.baselines:
        if others:
            raise UsageError(f"--baselines trains nothing: {' '.join(others)} has no effect")
        out = arguments.out or Path("runs/baselines")
        out.mkdir(parents=True, exist_ok=True)
        text = sweep_report.paper_table(measure_baselines(arguments, out), {})
        files.write_text(out / "baselines.md", text)
        print(text, end="")
        return 0

    out = arguments.out or Path("runs") / f"sweep-{Path(str(arguments.preset)).stem}"
    key, jobs = plan(arguments, out, others)
    common = _settings(["--config", str(arguments.preset), *others])
    check_same(out / SETTINGS, common)
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / SETTINGS, common.to_yaml())
    failed = []
    for number, job in enumerate(jobs, 1):
        if is_trained(job.out) and read_evaluation(job.out, arguments):
            continue
        print(f"run {number} of {len(jobs)}: {job.out}", flush=True)
        if status := in_its_own_process(job, arguments):
            failed.append(f"{job.out} ({signal.Signals(-status).name if status < 0 else f'status {status}'})")

    results: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        if result := read_evaluation(job.out, arguments):
            results.setdefault(job.value, []).append(result)
    text = sweep_report.table(key, results)
    if results and jobs[0].config.data.name in SHAPES:
        text += "\n" + sweep_report.paper_table(
            measure_baselines(arguments, out), results if key == "beta" else {}
        )
    if results:
        files.write_text(out / "sweep.md", text)
        sweep_report.draw(key, results).savefig(out / "sweep.png", dpi=120)
        print(f"{text}\nresults: {out}/ (see sweep.png, sweep.md)")
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}", file=sys.stderr)
        print("their messages are above; run the same command to try them again", file=sys.stderr)
    return 1 if failed else 0


def measure_baselines(arguments: Arguments, out: Path) -> sweep_report.Baselines:
    """The baselines' scores: read from the folder if it has them for as many points, else measured."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        stored = json.loads((out / BASELINES).read_text())
        if stored["points"] == arguments.points:
            return stored["scores"]
    scores = baselines.measure(arguments.points, device=choose_device(arguments.device))
    text = json.dumps({"points": arguments.points, "scores": scores}, indent=1) + "\n"
    files.write_text(out / BASELINES, text)
    return scores


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a run failed, 2 input that cannot be used, 130 stopped."""
    arguments, others = tyro.cli(
        Arguments, args=argv, description=__doc__, prog="python -m bvae.sweep", return_unknown_args=True
    )
    stops = (signal.SIGTERM, signal.SIGUSR1)  # they stop the sweep as Ctrl-C does
    before = [signal.signal(number, signal.default_int_handler) for number in stops]
    try:
        return exit_status(lambda: sweep(arguments, others))
    finally:
        for number, handler in zip(stops, before, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
