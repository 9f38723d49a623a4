"""Train a preset on a grid of values with several seeds, evaluate every model, and plot the results.

  python -m bvae.sweep locatello_sprites_beta4 --grid beta=1,4 --seeds 5
  python -m bvae.sweep locatello_sprites_beta4 --grid "loss_type=H beta=1,4" --grid "loss_type=B gamma=10,100"
  python -m bvae.sweep --baselines      scores of codes without training, and the beta-VAE paper's figures

Options that are not listed here are passed to bvae.train (--max-steps 2000). The same command again continues
where it was stopped. The sweep's folder holds a run folder for each model; sweep.md, .csv, .tex and .png with
mean and spread over seeds; statistics.md with pairwise tests and rank correlations; tradeoffs.png with the
reconstruction and the scores against the KL.
"""

import signal
import sys

from bvae.errors import exit_status, needs_train_extra
from bvae.paths import call

with needs_train_extra(__name__):
    import tyro

    from bvae.evaluation.options import SweepOptions


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a run failed, 2 input that cannot be used, 130 stopped."""

    def run() -> int:
        arguments, others = tyro.cli(
            SweepOptions,
            args=argv,
            description=__doc__,
            prog="python -m bvae.sweep",
            return_unknown_args=True,
        )
        from bvae.evaluation.sweeping import sweep  # torch takes seconds, which --help need not

        return call(lambda options: sweep(options, others), arguments)

    stops = [signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        stops.append(signal.SIGHUP)
    # They stop the sweep as Ctrl-C does.
    before = [signal.signal(number, signal.default_int_handler) for number in stops]
    try:
        return exit_status(run)
    finally:
        for number, handler in zip(stops, before, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
