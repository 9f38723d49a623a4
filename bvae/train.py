"""Train a beta-VAE.

  python -m bvae.train                                    drawn faces; on a CPU a preset of under 4 minutes
  python -m bvae.train --data celeba --data-root DIR --amp
  python -m bvae.train --data folder --data-root DIR --loss-type H --beta 4
  python -m bvae.train --config bbvae.yaml                PyTorch-VAE's configurations run as written
  python -m bvae.train --resume runs/NAME                 continue after Ctrl-C or a crash
  torchrun --nproc-per-node 8 -m bvae.train --batch-size 1152 ...    on eight GPUs, 144 images each per step

Results are in runs/NAME: traversals.gif, model.safetensors, metrics.jsonl and more.
"""

import sys

from bvae.errors import needs_train_extra

with needs_train_extra(__name__):
    from bvae.training import nan_debug, results
    from bvae.training.cli import Arguments, parse
    from bvae.training.distributed import exit_process, silence_other_ranks
    from bvae.training.failures import continue_with, explain
    from bvae.training.loop import train
    from bvae.training.monitor import Monitor
    from bvae.training.profiler import Profile, name_kernels
    from bvae.training.run import Run
    from bvae.training.setup import open_run
    from bvae.training.signals import StopRequest


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or stopped on request, 1 the run failed, 2 it could not start as asked for.

    130: stopped on request before there was a checkpoint.
    """
    silence_other_ranks()
    arguments: Arguments | None = None
    run: Run | None = None
    with StopRequest() as stop:
        try:
            arguments = parse(sys.argv[1:] if argv is None else argv, __doc__)
            if arguments.profile:
                name_kernels()
            with open_run(arguments) as run:
                if arguments.debug_nan:
                    print(nan_debug.find(run) or f"every number up to step {run.done} is finite")
                    return 0
                profiled = arguments.profile and run.distributed.is_main
                profile = Profile(run.out, run.step.device) if profiled and run.out else None
                with Monitor(run, profile=profile) as monitor:
                    result = train(run, monitor, stop)
                if not result:
                    print(f"stopped at step {run.done} of {run.steps}. {continue_with(run.out)}")
                elif run.distributed.is_main:
                    results.write(run, result)
                    results.show(run, result, monitor.throughput.images_per_s)
                run.close()
                return 0
        except (Exception, KeyboardInterrupt) as error:
            status = explain(error, run, arguments.resume if arguments else None)
            if status is None:
                raise
            return status


if __name__ == "__main__":
    exit_process(main())
