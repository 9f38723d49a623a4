"""A sweep: train a grid with several seeds, evaluate every model, and report."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bvae import config, files
from bvae.config import SHAPES, Config
from bvae.device import choose_device
from bvae.errors import UsageError, exit_status
from bvae.evaluation import baselines, run_folder, sweep_report
from bvae.evaluation.options import Protocol, SweepOptions
from bvae.opening import TABLE, read_bytes
from bvae.owner import own
from bvae.training import checkpoint, completion
from bvae.training.cli import parse
from bvae.training.command import execute

BASELINES = "baselines.json"
SETTINGS = "sweep.yaml"  # the options that all runs share


class Job(NamedTuple):
    """One run of the sweep."""

    value: str  # of the grid
    out: Path
    command: list[str]  # of bvae.train, from the beginning
    config: Config


def plan(arguments: SweepOptions, out: Path, others: Sequence[str]) -> tuple[str, list[Job]]:
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
    if key == "beta" and first.objective.loss_type not in ("H", "TC"):
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
        return parse(command, "").settings


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
def read_evaluation(run: Path, arguments: SweepOptions) -> dict[str, Any] | None:
    """The result of bvae.evaluate with the same seeds and points, if there is one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        result = json.loads(read_bytes(run / "evaluation.json", TABLE))
        if (result["seeds"], result["points"]) == (arguments.metric_seeds, arguments.points):
            return result
    return None


def train_and_evaluate(job: Job, arguments: SweepOptions) -> int:
    """Do the unfinished part of a run; return the exit status of the failure, or 0."""
    if not completion.is_marked(job.out):
        status = _train(job, arguments)
        if status or not completion.is_marked(job.out):
            return status or 130  # stopped, with a checkpoint
    protocol = Protocol(seeds=arguments.metric_seeds, points=arguments.points, device=arguments.device)
    return exit_status(lambda: print(run_folder.evaluate(job.out, protocol), end=""))


def _train(job: Job, arguments: SweepOptions) -> int:
    """Continue a run from its checkpoints, or start it; return bvae.train's exit status."""
    folder = job.out / checkpoint.FOLDER
    if job.out.is_symlink():
        raise UsageError(f"{job.out} is a link, and no run of this sweep: remove it")
    if checkpoint.checkpoints(folder):
        status = execute(["--resume", str(job.out), "--device", arguments.device], "")
        if not status or checkpoint.checkpoints(folder):
            return status
        print(f"{job.out} has no checkpoint that can be read: it is trained again", flush=True)
    if job.out.exists():  # stopped before its first checkpoint
        with own(job.out):
            shutil.rmtree(job.out)
    return execute(job.command, "")


def _run_process(job: Job, arguments: SweepOptions) -> None:
    """Run `train_and_evaluate` as a process. Only the sweep gets Ctrl-C, and passes it on."""
    os.setpgid(0, 0)
    sys.exit(exit_status(lambda: train_and_evaluate(job, arguments)))


def in_its_own_process(job: Job, arguments: SweepOptions) -> int:
    """Run a job in a process, so that a crash does not end the sweep. Returns its exit status or -signal.

    Raises:
        KeyboardInterrupt: Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP, after the run has written its checkpoint.
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
def sweep(arguments: SweepOptions, others: Sequence[str]) -> int:
    """Train and evaluate the unfinished runs, and report; return 1 if a run failed."""
    arguments.check()
    if arguments.baselines:
        if others:
            raise UsageError(f"--baselines trains nothing: {' '.join(others)} has no effect")
        out = arguments.out or Path("runs/baselines")
        files.make_folder(out)
        with own(out):
            text = sweep_report.paper_table(measure_baselines(arguments, out), {})
            files.write_text(out / "baselines.md", text)
        print(text, end="")
        return 0

    out = arguments.out or Path("runs") / f"sweep-{Path(str(arguments.preset)).stem}"
    key, jobs = plan(arguments, out, others)
    common = _settings(["--config", str(arguments.preset), *others])
    files.make_folder(out)
    with own(out):
        check_same(out / SETTINGS, common)
        files.write_text(out / SETTINGS, common.to_yaml())
        return _train_all(arguments, out, key, jobs)


def _train_all(arguments: SweepOptions, out: Path, key: str, jobs: Sequence[Job]) -> int:
    """Train and evaluate the unfinished runs, and report; return 1 if a run failed."""
    failed = []
    for number, job in enumerate(jobs, 1):
        if completion.is_marked(job.out) and read_evaluation(job.out, arguments):
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
        picture = io.BytesIO()
        sweep_report.draw(key, results).savefig(picture, format="png", dpi=120)
        files.write_bytes(out / "sweep.png", picture.getvalue())
        print(f"{text}\nresults: {out}/ (see sweep.png, sweep.md)")
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}", file=sys.stderr)
        print("their messages are above; run the same command to try them again", file=sys.stderr)
    return 1 if failed else 0


def measure_baselines(arguments: SweepOptions, out: Path) -> sweep_report.Baselines:
    """The baselines' scores: read from the folder if it has them for as many points, else measured."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        stored = json.loads(read_bytes(out / BASELINES, TABLE))
        if stored["points"] == arguments.points:
            return stored["scores"]
    scores = baselines.measure(arguments.points, device=choose_device(arguments.device))
    text = json.dumps({"points": arguments.points, "scores": scores}, indent=1) + "\n"
    files.write_text(out / BASELINES, text)
    return scores
