"""Set models side by side: `python -m bvae.compare runs/faces-H-1 runs/faces-VAE-1 --factor azimuth`.

For each model, the command changes the latent that has the most information about one factor, starting from
the same image: one row per model. In a model that separates the factors, only that factor changes. Writes the
picture, as PNG and as GIF, and the table that it prints.
"""

import sys

from bvae.errors import exit_status, needs_train_extra
from bvae.paths import call

with needs_train_extra(__name__):
    import tyro

    from bvae.evaluation.options import CompareOptions


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 input that cannot be used."""

    def run() -> None:
        arguments = tyro.cli(CompareOptions, args=argv, description=__doc__, prog="python -m bvae.compare")
        from bvae.evaluation.comparison import compare  # torch takes seconds, which --help need not

        arguments.register_network()
        print(call(compare, arguments), end="")

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
