"""Draw new images from a trained model: `python -m bvae.sample runs/faces-B-1 --n 64`.

They are decoded from samples of the prior, z ~ N(0, I).
"""

import sys

from bvae.errors import exit_status, needs_train_extra
from bvae.paths import call

with needs_train_extra(__name__):
    import tyro

    from bvae.evaluation.options import SampleOptions


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 input that cannot be used."""

    def run() -> None:
        arguments = tyro.cli(SampleOptions, args=argv, description=__doc__, prog="python -m bvae.sample")
        from bvae.evaluation.pictures import sample  # torch takes seconds, which --help need not

        arguments.register_network()
        print(call(sample, arguments))

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
