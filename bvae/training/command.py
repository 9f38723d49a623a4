"""The command `python -m bvae.train`: train the run that the command line describes."""

from bvae.streams import robust
from bvae.training import nan_debug, results
from bvae.training.cli import Arguments, parse
from bvae.training.distributed import silence_other_ranks
from bvae.training.failures import continue_with, explain
from bvae.training.loop import train
from bvae.training.monitor import Monitor
from bvae.training.profiler import Profile, name_kernels
from bvae.training.run import Run
from bvae.training.setup import open_run
from bvae.training.signals import StopRequest
from bvae.training.trackers import TRACKERS


def execute(argv: list[str], description: str) -> int:
    """Train, write the results, and return the exit status of `bvae.train.main`."""
    silence_other_ranks()
    arguments: Arguments | None = None
    run: Run | None = None
    with robust(), StopRequest() as stop:
        try:
            arguments = parse(argv, description)
            if arguments.profile:
                name_kernels()
            trackers = [TRACKERS[arguments.log]()] if arguments.log else []
            with open_run(arguments) as run:
                if arguments.debug_nan:
                    print(nan_debug.find_not_finite(run) or f"every number up to step {run.done} is finite")
                    return 0
                profiled = arguments.profile and run.distributed.is_main
                profile = Profile(run.out, run.step.device) if profiled and run.out else None
                with Monitor(run, trackers, profile) as monitor:
                    result = train(run, monitor, stop)
                if not result:
                    print(f"stopped at step {run.done} of {run.steps}. {continue_with(run.out)}")
                elif run.distributed.is_main:
                    results.write(run, result)
                    results.show(run, result, monitor.throughput.images_per_s)
                monitor.end(result)
                run.close()
                return 0
        except (Exception, KeyboardInterrupt) as error:
            status = explain(error, run, arguments)
            if status is None:
                raise
            return status
