"""The runs of a sweep as jobs of a cluster, by submitit (the extra `cluster`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bvae.errors import UsageError
from bvae.evaluation.jobs import Job, train_and_evaluate
from bvae.evaluation.options import SweepOptions

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

POLL = {"slurm": 30.0, "local": 1.0}  # seconds between two looks at the jobs


class Task:
    """One run. If SLURM preempts it, or its time is over, it is submitted again and resumes."""

    def __init__(self, job: Job, arguments: SweepOptions) -> None:
        self.job, self.arguments = job, arguments

    def __call__(self) -> int:
        """Train and evaluate; return the exit status."""
        return train_and_evaluate(self.job, self.arguments)

    def checkpoint(self) -> "DelayedSubmission":
        """What submitit submits again: the same run, which continues from its last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_all(jobs: Sequence[Job], arguments: SweepOptions, folder: Path) -> list[tuple[Job, int]]:
    """Submit all jobs, wait for them, and return their exit statuses; 1 for one that crashed.

    Args:
        folder: of submitit's scripts and logs.

    Raises:
        ValueError: no such cluster here, or parameters that it does not take.
        KeyboardInterrupt: Ctrl-C; the jobs are cancelled.
    """
    try:
        import submitit
        from submitit.helpers import as_completed
    except ModuleNotFoundError:
        raise UsageError("--cluster needs submitit: pip install 'bvae[cluster]'") from None

    assert arguments.cluster
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=arguments.cluster)
        executor.update_parameters(name="bvae", **_parameters(arguments.cluster_parameters))
    except (RuntimeError, NameError, TypeError, AssertionError) as error:
        raise UsageError(f"--cluster {arguments.cluster}: {error}") from None
    submitted = {executor.submit(Task(job, arguments)): job for job in jobs}
    print(f"{len(submitted)} jobs are submitted; their logs are in {folder}/", flush=True)
    ended: list[tuple[Job, int]] = []
    try:
        for done in as_completed(list(submitted), poll_frequency=POLL[arguments.cluster]):
            job = submitted[done]
            try:
                status = done.result()
            except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
                status = 1
            print(f"run {len(ended) + 1} of {len(jobs)}: {job.out}, status {status}", flush=True)
            ended.append((job, status))
    finally:
        for each in submitted:
            if not each.done():
                each.cancel(check=False)
    return ended


def _parameters(texts: Sequence[str]) -> dict[str, Any]:
    """submitit's parameters from texts such as slurm_partition=gpu and timeout_min=240."""
    parameters: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"--cluster-parameters must be NAME=VALUE, got {text!r}")
        parameters[name] = int(value) if value.isdigit() else value
    return parameters
