"""Train a beta-VAE.

  python -m bvae.train                                    drawn faces; under 4 minutes on a CPU
  python -m bvae.train --data celeba --data-root DIR --amp
  python -m bvae.train --data folder --data-root DIR --loss-type H --beta 4
  python -m bvae.train --config bbvae.yaml                PyTorch-VAE's configurations run as written
  python -m bvae.train --resume runs/NAME                 continue after Ctrl-C or a crash
  torchrun --nproc-per-node 8 -m bvae.train --batch-size 1152 ...    on eight GPUs, 144 images each per step

Results are in runs/NAME: explorer.html, traversals.gif, model.safetensors, metrics.jsonl and more.
"""

import sys

from bvae.errors import exit_status, needs_train_extra

with needs_train_extra(__name__):
    from bvae.training.cli import parse


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or stopped on request, 1 the run failed, 2 it could not start.

    130: stopped on request before there was a checkpoint.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"}.isdisjoint(argv):
        # This prints the options and exits. The import below loads torch, which takes seconds.
        return exit_status(lambda: print(parse(argv, __doc__)))
    from bvae.training.command import execute

    return execute(argv, __doc__)


if __name__ == "__main__":
    with needs_train_extra(__name__):
        status = main()
    from bvae.training.distributed import exit_process

    exit_process(status)
