"""The runs of a sweep: each trains and is evaluated in a process of its own, several at a time."""

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bvae import files
from bvae.config import Config
from bvae.errors import UsageError, exit_status
from bvae.evaluation import run_folder
from bvae.evaluation.options import Protocol, SweepOptions
from bvae.opening import TABLE, read_bytes
from bvae.owner import own
from bvae.training import checkpoint, completion
from bvae.training.command import execute


class Job(NamedTuple):
    """One run of the sweep."""

    label: str  # of its cell of the grid
    out: Path
    command: list[str]  # of bvae.train, from the beginning
    config: Config


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


# --- Processes --------------------------------------------------------------------------------------------
def run_all(jobs: Sequence[Job], arguments: SweepOptions) -> list[tuple[Job, int]]:
    """Run jobs in processes, so that a crash does not end the sweep; return their exit statuses or -signals.

    One at a time writes to the terminal. Of several, each writes to a log file beside its folder, has its
    share of the threads, and takes the next GPU in turn.

    Raises:
        KeyboardInterrupt: Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP, after the runs have written their checkpoints.
    """
    left, free, ended = list(jobs), list(range(arguments.jobs)), []
    context, running = multiprocessing.get_context("spawn"), dict[BaseProcess, tuple[Job, int]]()
    try:
        while left or running:
            while left and free:
                job, slot = left.pop(0), free.pop(0)
                print(f"run {len(jobs) - len(left)} of {len(jobs)}: {job.out}", flush=True)
                started = context.Process(target=_run_process, args=(job, arguments, slot))
                started.start()
                running[started] = job, slot
            wait([process.sentinel for process in running])
            for process in [process for process in running if process.exitcode is not None]:
                job, slot = running.pop(process)
                free.append(slot)
                ended.append((job, process.exitcode or 0))
        return ended
    finally:  # after Ctrl-C
        for process in running:
            process.terminate()
        for process in running:
            process.join()


def _run_process(job: Job, arguments: SweepOptions, slot: int) -> None:
    """Run `train_and_evaluate` as a process. Only the sweep gets Ctrl-C, and passes it on."""
    os.setpgid(0, 0)
    if arguments.jobs > 1:
        with files.append_text(log_file(job)) as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        torch.set_num_threads(max(1, torch.get_num_threads() // arguments.jobs))
        use_gpu(slot)
    sys.exit(exit_status(lambda: train_and_evaluate(job, arguments)))


def log_file(job: Job) -> Path:
    """What a job prints, if several run at a time."""
    return job.out.with_name(f"{job.out.name}.log")


def use_gpu(slot: int) -> None:
    """Show this process one GPU, before it starts CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(torch.cuda.device_count())] if named is None else named.split(",")
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
