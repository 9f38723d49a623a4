"""Train an InfoGAN, to compare a VAE with: `python -m bvae.infogan`.

  python -m bvae.infogan                          drawn faces at 32 x 32; minutes on a CPU
  python -m bvae.infogan --data celeba --data-root DIR --image-size 64 --width 64
  python -m bvae.infogan --resume runs/NAME       continue after Ctrl-C or a crash

Ten codes of ten categories each, and noise, become images; a network Q reads the codes from them (Chen et al.
2016). bvae.traverse, bvae.compare, bvae.evaluate and bvae.sample take the run folder as they take a VAE's.
"""

import sys

from bvae.errors import exit_status, needs_train_extra

with needs_train_extra(__name__):
    from bvae.training.infogan_cli import parse


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or stopped on request, 1 the run failed, 2 it could not start.

    130: stopped on request before there was a checkpoint.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"}.isdisjoint(argv):
        # This prints the options and exits. The import below loads torch, which takes seconds.
        return exit_status(lambda: print(parse(argv, __doc__)))
    from bvae.training.infogan import execute

    return exit_status(lambda: execute(argv, __doc__))


if __name__ == "__main__":
    with needs_train_extra(__name__):
        status = main()
    sys.exit(status)
