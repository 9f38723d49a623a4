"""A sweep: train a grid with several seeds, evaluate every model, and report."""

import contextlib
import dataclasses
import io
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bvae import config, files
from bvae.command_line import nearest
from bvae.config import SHAPES, Config
from bvae.device import choose_device
from bvae.errors import UsageError
from bvae.evaluation import baselines, cluster, grid, sweep_plots, sweep_report
from bvae.evaluation.agreement import add_udr
from bvae.evaluation.jobs import Job, read_evaluation, run_all
from bvae.evaluation.options import Protocol, SweepOptions
from bvae.opening import TABLE, read_bytes
from bvae.owner import own
from bvae.training import completion
from bvae.training.cli import Arguments, parse

BASELINES = "baselines.json"
SETTINGS = "sweep.yaml"  # the options that all runs share


def check_options(others: Sequence[str]) -> None:
    """Raise UsageError for an option that is neither the sweep's nor bvae.train's."""
    of_train = [*(field.name for field in dataclasses.fields(Arguments)), *config.option_places()]
    own = [field.name for field in dataclasses.fields(SweepOptions)]
    of_train.append("import")  # named otherwise in Python
    known = [f"--{name.replace('_', '-')}" for name in (*own, *of_train)]
    for word in others:
        option = word.partition("=")[0]
        if word.startswith("--") and option.replace("--no-", "--").replace("_", "-") not in known:
            raise UsageError(f"unknown option {option}{nearest(option, known)}")


def plan(arguments: SweepOptions, out: Path, others: Sequence[str]) -> tuple[str, list[Job]]:
    """The grid's key, and the runs.

    Raises:
        ValueError: a grid without effect, or values that bvae.train does not take.
        SystemExit: options that cannot be read.
    """
    key, cells = grid.parse(arguments.grid)
    jobs = []
    for cell in cells:
        for seed in range(arguments.seeds):
            run = out / f"{cell.folder}-seed-{seed}"
            command = [
                *("--config", str(arguments.preset), "--device", arguments.device, *others),
                *(*cell.command, "--seed", str(seed), "--out", str(run)),
            ]
            jobs.append(Job(cell.label, run, command, _settings(command)))
    for cell, job in zip(cells, jobs[:: arguments.seeds], strict=True):
        loss_type = job.config.objective.loss_type
        if "beta" in cell.options and loss_type not in ("H", "TC"):
            raise UsageError(
                f"beta has no effect on {arguments.preset}'s loss {loss_type}: add --loss-type H"
            )
    first = jobs[0].config
    configs = [job.config for job in jobs[:: arguments.seeds]]
    if any(config in configs[:i] for i, config in enumerate(configs)):
        raise UsageError(f"--grid {' '.join(arguments.grid)}: two of the values make no difference")
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


# --- All of them ------------------------------------------------------------------------------------------
def sweep(arguments: SweepOptions, others: Sequence[str]) -> int:
    """Train and evaluate the unfinished runs, and report; return 1 if a run failed."""
    check_options(others)
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
    left = [
        job for job in jobs if not (completion.is_marked(job.out) and read_evaluation(job.out, arguments))
    ]
    if arguments.cluster and left:
        ended = cluster.run_all(left, arguments, out / "cluster")
    else:
        ended = run_all(left, arguments)
    failed = [
        f"{job.out} ({signal.Signals(-status).name if status < 0 else f'status {status}'})"
        for job, status in ended
        if status
    ]

    results: dict[str, list[dict[str, Any]]] = {}
    runs: dict[str, list[Path]] = {}
    for job in jobs:
        if result := read_evaluation(job.out, arguments):
            results.setdefault(job.label, []).append({**result, "run": job.out.name})
            runs.setdefault(job.label, []).append(job.out)
    for label, alike in runs.items():
        if len(alike) > 1:
            protocol = Protocol(points=arguments.points)
            add_udr(alike, results[label], protocol, choose_device(arguments.device))
    text = sweep_report.table(key, results)
    if results and jobs[0].config.data.name in SHAPES:
        text += "\n" + sweep_report.paper_table(
            measure_baselines(arguments, out), results if key == "beta" else {}
        )
    if results:
        _write(out, key, results, text)
        print(f"{text}\nresults: {out}/ (see sweep.png, tradeoffs.png, statistics.md, sweep.csv, sweep.tex)")
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}", file=sys.stderr)
        if arguments.cluster:
            where = f"in {out / 'cluster'}/"
        else:
            where = f"in {out}/*.log" if arguments.jobs > 1 else "above"
        print(f"their messages are {where}; run the same command to try them again", file=sys.stderr)
    return 1 if failed else 0


def _write(out: Path, key: str, results: sweep_report.Results, text: str) -> None:
    """Write the report into the sweep's folder. Raises OSError."""
    files.write_text(out / "sweep.md", text)
    files.write_text(out / "statistics.md", sweep_report.comparisons(results))
    files.write_text(out / "sweep.csv", sweep_report.csv_table(key, results))
    files.write_text(out / "sweep.tex", sweep_report.latex(key, results))
    for name, draw in (("sweep", sweep_plots.draw), ("tradeoffs", sweep_plots.draw_tradeoffs)):
        picture = io.BytesIO()
        draw(key, results).savefig(picture, format="png", dpi=120)
        files.write_bytes(out / f"{name}.png", picture.getvalue())


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
